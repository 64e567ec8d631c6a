import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from recflow.core.errors import ConfigError
from recflow.modeling.config import FUSIONS, UserModelConfig
from recflow.modeling.late_fusion import LateFusion
from recflow.modeling.user_model import (
    ItemFeatures,
    ItemStates,
    UserModel,
    UserModelShape,
    fit_feature_scale,
)
from recflow.modeling.user_vector import AttentivePooling, MultiHeadPooling, UserVector

ITEMS, DIMENSION = 5, 4
SHAPE = UserModelShape(dimension=DIMENSION, categories=2, history_length=6, top_k=2, heads=2)
WITH_IDS = {"items": 3, "users": 2, "id_dimension": 3}
CATEGORIES = torch.tensor([0, 1, 2, 1, 1])
IDS = torch.tensor([1, 2, 3, 0, 0])

KINDS = [
    *({"kind": "late_fusion", "fusion": fusion} for fusion in FUSIONS),
    *({"kind": kind} for kind in ("mean", "attentive", "multi_head")),
]
ALL = [kind | ids for kind in KINDS for ids in ({}, WITH_IDS)]


@pytest.fixture
def vectors() -> Tensor:
    torch.manual_seed(1)
    return functional.normalize(torch.randn(ITEMS, DIMENSION), dim=-1)


def build(**sizes: object) -> UserModel:
    """A model of which no weight is zero, so that nothing hides behind a start value."""
    torch.manual_seed(0)
    model = UserModel(dataclasses.replace(SHAPE, **sizes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.startswith("identity.") and parameter.dim() == 2 and "text" not in name:
                parameter[0] = 0
    return model


def describe(model: UserModel, vectors: Tensor, ids: Tensor = IDS) -> ItemStates:
    known = ids if model.shape.items else torch.zeros_like(ids)
    return model.describe_items(vectors, ItemFeatures(CATEGORIES, known))


@pytest.fixture(params=ALL, ids=lambda sizes: "-".join(str(v) for v in sizes.values()))
def model(request: pytest.FixtureRequest) -> UserModel:
    return build(**request.param)


# What holds for all kinds


def test_padding_changes_nothing(model: UserModel, vectors: Tensor) -> None:
    items, users = describe(model, vectors), torch.tensor([1])
    short = model(items, torch.tensor([[1, 2]]), torch.tensor([[0, 3]]), users)
    padded = model(items, torch.tensor([[-1, -1, -1, 1, 2]]), torch.tensor([[0, 3, -1]]), users)
    torch.testing.assert_close(padded[:, :2], short)


def test_other_users_of_the_batch_change_nothing(model: UserModel, vectors: Tensor) -> None:
    items = describe(model, vectors)
    history = torch.tensor([[-1, -1, -1], [-1, 0, 1], [2, 3, 4]])
    slates, users = torch.tensor([[0, 1], [2, 3], [4, -1]]), torch.tensor([1, 0, 2])
    together = model(items, history, slates, users)
    for row in range(3):
        alone = model(items, history[[row]], slates[[row]], users[[row]])
        torch.testing.assert_close(together[[row]], alone)


def test_a_shared_slate_scores_like_separate_ones(model: UserModel, vectors: Tensor) -> None:
    items, users = describe(model, vectors), torch.tensor([1, 0])
    history, slate = torch.tensor([[-1, 0, 1], [2, 3, 4]]), torch.tensor([[0, 2, 4]])
    torch.testing.assert_close(
        model(items, history, slate, users), model(items, history, slate.expand(2, -1), users)
    )


def test_picked_items_score_as_they_did(model: UserModel, vectors: Tensor) -> None:
    items = describe(model, vectors)
    expected = model(items, torch.tensor([[1, 4]]), torch.tensor([[0, 3]]))
    picked = items[torch.tensor([4, 3, 1, 0])]
    torch.testing.assert_close(
        model(picked, torch.tensor([[2, 0]]), torch.tensor([[3, 1]])), expected
    )


def test_empty_histories_have_scores_and_gradients(model: UserModel, vectors: Tensor) -> None:
    vectors.requires_grad_()
    items = describe(model, vectors)
    history = torch.tensor([[-1, -1], [-1, -1], [0, 1]])
    scores = model(
        items, history, torch.tensor([[0, 1], [-1, -1], [2, 3]]), torch.tensor([0, 1, 2])
    )
    assert scores.isfinite().all()
    assert scores[0].unique().numel() == 2
    scores.square().sum().backward()
    gradients = [vectors.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_every_weight_learns(model: UserModel, vectors: Tensor) -> None:
    items = describe(model, vectors)
    history = torch.tensor([[-1, -1, -1], [-1, 0, 1], [2, 3, 4]])
    scores = model(items, history, torch.tensor([[0, 1], [2, 3], [0, 4]]), torch.tensor([1, 0, 2]))
    scores.square().sum().backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not idle


def test_a_copy_of_the_weights_scores_alike(model: UserModel, vectors: Tensor) -> None:
    copy = UserModel(UserModelShape(**dataclasses.asdict(model.shape))).eval()
    copy.load_state_dict(model.state_dict())
    history, slate, users = torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4]]), torch.tensor([2])
    torch.testing.assert_close(
        copy(describe(copy, vectors), history, slate, users),
        model(describe(model, vectors), history, slate, users),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda sizes: "-".join(sizes.values()))
def test_without_ids_nobody_is_known(kind: dict[str, str], vectors: Tensor) -> None:
    model = build(**kind)
    history, slate = torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(
        model(model.describe_items(vectors, ItemFeatures(CATEGORIES, IDS)), history, slate),
        model(
            model.describe_items(vectors, ItemFeatures(CATEGORIES, IDS.flip(0))),
            history,
            slate,
            torch.tensor([2]),
        ),
        rtol=0,
        atol=0,
    )


# Late fusion


def test_features_by_hand(vectors: Tensor) -> None:
    torch.manual_seed(0)
    model = UserModel(SHAPE)
    channels = describe(model, vectors).channels
    assert isinstance(model.fit, LateFusion)
    features = model.fit.features(channels, torch.tensor([[-1, 1, 2, 3]]), torch.tensor([[0]]))
    similarity = (vectors[[1, 2, 3]] @ vectors[0]).numpy()  # the projection is the identity
    weights = np.exp(10 * similarity) / np.exp(10 * similarity).sum()
    expected = [
        similarity.mean(),
        similarity.max(),
        np.sort(similarity)[-2:].mean(),
        similarity[-1],
        (weights * similarity).sum(),
        similarity.mean(),  # all ages weigh the same at the start
    ]
    np.testing.assert_allclose(features[0, 0, :6].detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fusion", "summary"),
    [("mean", np.mean), ("max", np.max), ("top_k", lambda x: np.sort(x)[-2:].mean())],
)
def test_one_summary_alone_by_hand(fusion: str, summary, vectors: Tensor) -> None:
    model = UserModel(dataclasses.replace(SHAPE, categories=0, fusion=fusion)).eval()
    items = describe(model, vectors)
    score = model(items, torch.tensor([[-1, 1, 2, 3]]), torch.tensor([[0]])) - items.appeal[0]
    assert isinstance(model.fit, LateFusion)
    weight, bias = model.fit.linear.weight.item(), model.fit.linear.bias.item()
    similarity = (vectors[[1, 2, 3]] @ vectors[0]).numpy()
    assert score.item() == pytest.approx(weight * summary(similarity) + bias, abs=1e-6)


def test_fewer_clicks_than_top_k(vectors: Tensor) -> None:
    model = UserModel(SHAPE)
    assert isinstance(model.fit, LateFusion)
    features = model.fit.features(
        describe(model, vectors).channels, torch.tensor([[-1, -1, 2]]), torch.tensor([[0]])
    )
    assert features[0, 0, 2].item() == pytest.approx(float(vectors[2] @ vectors[0]), abs=1e-6)


def test_cold_users_of_late_fusion_get_the_appeal_alone(vectors: Tensor) -> None:
    model = build()
    items = describe(model, vectors)
    scores = model(items, torch.full((1, 3), -1), torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(scores[0], items.appeal[:3])
    assert scores[0].unique().numel() == 3


def test_scale_is_that_of_the_sample(vectors: Tensor) -> None:
    model = build()
    items = describe(model, vectors)
    history = torch.tensor([[0, 1], [-1, -1], [2, 4]])
    slates = torch.tensor([[2, 3, -1], [0, 1, 2], [0, 1, 3]])
    fit_feature_scale(model, items, history, slates)
    assert isinstance(model.fit, LateFusion)
    raw = model.fit.features(items.channels, history, slates.clamp(min=0)).detach()
    seen = torch.cat([raw[0, :2], raw[2]])  # neither padding nor the cold user
    torch.testing.assert_close(model.fit.feature_mean, seen.mean(0))
    torch.testing.assert_close(model.fit.feature_scale, seen.std(0, correction=0).clamp(min=1e-3))


def test_nothing_to_fit_the_scale_on_leaves_it(vectors: Tensor) -> None:
    model = build()
    fit_feature_scale(
        model, describe(model, vectors), torch.full((2, 3), -1), torch.tensor([[0], [1]])
    )
    assert isinstance(model.fit, LateFusion)
    assert model.fit.feature_mean.abs().sum() == 0


@pytest.mark.parametrize("kind", ["mean", "attentive", "multi_head"])
def test_a_user_vector_starts_with_scores_that_differ_a_little(kind: str, vectors: Tensor) -> None:
    model = build(kind=kind)
    items = describe(model, vectors)
    history = torch.tensor([[0, 1], [-1, -1], [2, 4]])
    slates = torch.tensor([[2, 3, -1], [0, 1, 2], [0, 1, 3]])
    fit_feature_scale(model, items, history, slates)
    fit = model(items, history, slates) - items.appeal[slates]
    seen = torch.cat([fit[0, :2], fit[2]])  # neither padding nor the cold user
    assert seen.std(correction=0).item() == pytest.approx(0.3, abs=1e-4)


# One vector of the user


def _channels(model: UserModel, vectors: Tensor) -> Tensor:
    return torch.cat(describe(model, vectors).channels, dim=-1)


def test_mean_by_hand(vectors: Tensor) -> None:
    model = build(kind="mean")
    items, joined = describe(model, vectors), _channels(model, vectors)
    assert isinstance(model.fit, UserVector)
    user = (joined[1] + joined[2]) / 2
    expected = items.appeal[[0, 3]] + model.fit.scale * (joined[[0, 3]] @ user)
    scores = model(items, torch.tensor([[-1, 1, 2]]), torch.tensor([[0, 3]]))
    torch.testing.assert_close(scores[0], expected)


def test_cold_users_of_a_user_vector_get_the_default(vectors: Tensor) -> None:
    model = build(kind="attentive")
    items, joined = describe(model, vectors), _channels(model, vectors)
    assert isinstance(model.fit, UserVector)
    expected = items.appeal[:3] + model.fit.scale * (joined[:3] @ model.fit.default)
    scores = model(items, torch.full((1, 4), -1), torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(scores[0], expected)


def test_attentive_pooling_by_hand() -> None:
    torch.manual_seed(0)
    pooling = AttentivePooling(3, 2)
    clicks = torch.randn(3, 3)
    logits = [
        pooling.query.weight @ torch.tanh(pooling.hidden.weight @ click + pooling.hidden.bias)
        for click in clicks[1:]
    ]
    weights = torch.cat(logits).softmax(0)
    expected = weights[0] * clicks[1] + weights[1] * clicks[2]
    pooled = pooling(clicks, torch.tensor([[-1, 1, 2]]))
    torch.testing.assert_close(pooled[0], expected)


def test_multi_head_pooling_agrees_with_torch() -> None:
    torch.manual_seed(0)
    pooling = MultiHeadPooling(6, 3, 4)
    reference = nn.MultiheadAttention(6, 3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(pooling.queries_keys_values.weight)
        reference.in_proj_bias.copy_(pooling.queries_keys_values.bias)
        reference.out_proj.load_state_dict(pooling.output.state_dict())
    vectors, history = torch.randn(5, 6), torch.tensor([[-1, 3, 0, 1], [1, 4, 2, 0]])
    clicks, seen = vectors[history.clamp(min=0)], history >= 0
    mixed, _ = reference(clicks, clicks, clicks, key_padding_mask=~seen, need_weights=False)
    expected = pooling.summary.pool(clicks + mixed, seen)
    torch.testing.assert_close(pooling(vectors, history), expected)


# Identity


def _identity_term(model: UserModel, vectors: Tensor, history: list[int], user: int) -> Tensor:
    """What identity adds to the scores of all items, for one user."""
    without = build(**{**dataclasses.asdict(model.shape), "items": 0, "users": 0})
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("identity.")}
    without.load_state_dict(state)
    clicks, slate = torch.tensor([history]), torch.arange(ITEMS)[None, :]
    return (
        model(describe(model, vectors), clicks, slate, torch.tensor([user]))
        - without(describe(without, vectors), clicks, slate)
    )[0]


def test_identity_by_hand(vectors: Tensor) -> None:
    model = build(kind="mean", **WITH_IDS)
    identity, text = model.identity, describe(model, vectors).channels[0]
    assert identity is not None
    age = identity.age.exp()
    implicit = age[-2] * identity.implicit.weight[2] + age[-1] * identity.implicit.weight[1]
    user = identity.user.weight[2] + implicit / (age[-2] + age[-1]).sqrt()
    factors = identity.item.weight[IDS] + identity.text(text)
    expected = identity.item_bias.weight[IDS, 0] + identity.user_bias.weight[2, 0] + factors @ user
    # Item 3 is in the history, but unknown: it neither adds nor changes the norm.
    term = _identity_term(model, vectors, [-1, 3, 1, 0], user=2)
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-5)


def test_unknown_items_and_users_add_nothing(vectors: Tensor) -> None:
    model = build(**WITH_IDS)
    assert model.identity is not None
    nn.init.zeros_(model.identity.text.weight)
    known = _identity_term(model, vectors, [0, 1], user=2)
    nobody = _identity_term(model, vectors, [-1, 3, 4], user=0)
    assert (known[:3].abs() > 1e-3).all()
    torch.testing.assert_close(nobody[3:], torch.zeros(2), rtol=0, atol=1e-6)
    assert model.identity.item_bias.weight[0] == 0


def test_the_unknown_stay_zero_in_training(vectors: Tensor) -> None:
    model = build(**WITH_IDS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        scores = model(
            describe(model, vectors),
            torch.tensor([[3, 0], [4, 1]]),
            torch.tensor([[0, 3], [3, 4]]),
            torch.tensor([0, 1]),
        )
        optimiser.zero_grad()
        scores.square().sum().backward()
        optimiser.step()
    assert model.identity is not None
    for name in ("item", "user", "implicit", "item_bias", "user_bias"):
        assert not getattr(model.identity, name).weight[0].any(), name


def test_users_alone_may_be_known(vectors: Tensor) -> None:
    model = build(users=2, id_dimension=3)
    first, second, unknown = (
        _identity_term(model, vectors, [0, 1], user=user) for user in (1, 2, 0)
    )
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(unknown, torch.zeros(ITEMS), rtol=0, atol=1e-6)


# Shapes and properties


def test_sizes_come_from_the_configuration() -> None:
    sizes = {"dimension": 8, "categories": 3, "items": 20, "users": 10}
    plain = UserModelShape.of(UserModelConfig(kind="mean", categories=False), **sizes)
    assert (plain.categories, plain.items, plain.users) == (0, 0, 0)
    assert plain.channels == (8,)
    named = UserModelShape.of(UserModelConfig(item_ids=True, id_dimension=7, top_k=4), **sizes)
    assert (named.categories, named.items, named.users) == (3, 20, 0)
    assert (named.kind, named.id_dimension, named.top_k) == ("late_fusion", 7, 4)
    assert named.knows_ids


@pytest.mark.parametrize("wrong", [{"kind": "oracle"}, {"fusion": "cold"}])
def test_an_unknown_kind_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
        UserModel(dataclasses.replace(SHAPE, **wrong))  # type: ignore[arg-type]


@settings(deadline=None)
@given(data=st.data())
def test_only_recency_and_similarity_see_the_order_of_clicks(data: st.DataObject) -> None:
    """Kinds that sum up a set do not depend on its order."""
    sizes = data.draw(
        st.sampled_from([{"fusion": "top_k"}, {"kind": "mean"}, {"kind": "multi_head"}])
    )
    history = data.draw(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=6))
    shuffled = data.draw(st.permutations(history))
    torch.manual_seed(1)
    vectors = functional.normalize(torch.randn(ITEMS, DIMENSION), dim=-1)
    model, slate = build(**sizes), torch.arange(ITEMS)[None, :]
    items = describe(model, vectors)
    torch.testing.assert_close(
        model(items, torch.tensor([history]), slate), model(items, torch.tensor([shuffled]), slate)
    )
