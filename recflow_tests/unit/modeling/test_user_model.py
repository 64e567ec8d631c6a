import numpy as np
import pytest
import torch
from torch import Tensor

from recflow.modeling.user_model import UserModel, UserModelShape, fit_feature_scale

SHAPE = UserModelShape(dimension=4, categories=2, history_length=6, top_k=2)


@pytest.fixture
def model() -> UserModel:
    torch.manual_seed(0)
    return UserModel(SHAPE).eval()


@pytest.fixture
def vectors() -> Tensor:
    torch.manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(5, 4), dim=-1)


def test_features_by_hand(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.tensor([0, 1, 2, 1, 1]))
    features = model.features(items, torch.tensor([[-1, 1, 2, 3]]), torch.tensor([[0]]))[0, 0]
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
    np.testing.assert_allclose(features[:6].detach().numpy(), expected, atol=1e-6)


def test_padding_changes_nothing(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.zeros(5, dtype=torch.long))
    short = model(items, torch.tensor([[1, 2]]), torch.tensor([[0, 3]]))
    padded = model(items, torch.tensor([[-1, -1, -1, 1, 2]]), torch.tensor([[0, 3, -1]]))
    torch.testing.assert_close(padded[:, :2], short)


def test_fewer_clicks_than_top_k(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.zeros(5, dtype=torch.long))
    features = model.features(items, torch.tensor([[-1, -1, 2]]), torch.tensor([[0]]))[0, 0]
    assert features[2].item() == pytest.approx(float(vectors[2] @ vectors[0]), abs=1e-6)


def test_cold_users_get_the_appeal_alone(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.tensor([0, 1, 2, 1, 1]))
    scores = model(items, torch.full((1, 3), -1), torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(scores[0], items.appeal[:3])
    assert scores[0].unique().numel() == 3


def test_a_shared_slate_scores_like_separate_ones(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.tensor([0, 1, 2, 1, 1]))
    history = torch.tensor([[-1, 0, 1], [2, 3, 4]])
    slate = torch.tensor([[0, 2, 4]])
    torch.testing.assert_close(
        model(items, history, slate), model(items, history, slate.expand(2, -1))
    )


def test_scale_is_that_of_the_sample(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.tensor([0, 1, 2, 1, 1]))
    history = torch.tensor([[0, 1], [-1, -1], [2, 4]])
    slates = torch.tensor([[2, 3, -1], [0, 1, 2], [0, 1, 3]])
    fit_feature_scale(model, items, history, slates)
    raw = model.features(items, history, slates).detach()
    seen = torch.cat([raw[0, :2], raw[2]])  # neither padding nor the cold user
    torch.testing.assert_close(model.feature_mean, seen.mean(0))


def test_nothing_to_fit_the_scale_on_leaves_it(model: UserModel, vectors: Tensor) -> None:
    items = model.describe_items(vectors, torch.zeros(5, dtype=torch.long))
    fit_feature_scale(model, items, torch.full((2, 3), -1), torch.tensor([[0], [1]]))
    assert model.feature_mean.abs().sum() == 0
