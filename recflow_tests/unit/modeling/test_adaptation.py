import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError, PermanentError
from recflow.core.seeding import make_rng
from recflow.modeling import adaptation
from recflow.modeling.adaptation import AdaptationReport, active_dropout, adapt_encoder
from recflow.modeling.adaptation_config import METHODS, AdaptationConfig
from recflow.modeling.encoder import TextEncoder, load_pretrained
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.modeling.families import DECODERS, write_family
from recflow_tests.unit.modeling.tiny import make_items

QUICK = AdaptationConfig(
    max_tokens=16,
    learning_rate=1e-3,
    epochs=100,
    max_steps=40,
    steps_between_validations=10,
    batch_size=32,
    threads=1,
)
IDS = torch.tensor([[2, 7, 8, 3]])
MASK = torch.ones_like(IDS, dtype=torch.bool)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_items(per_topic=40)[Columns.TEXT].to_list()


def adapt(
    texts: list[str], base_model: Path, output: Path, tracker: NullTracker | None = None, **changes
) -> AdaptationReport:
    output.mkdir(parents=True)
    return adapt_encoder(
        texts=texts,
        base_model=base_model,
        output=output,
        config=dataclasses.replace(QUICK, **changes),
        tracker=tracker or NullTracker(),
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_both_losses_fall_and_the_best_state_is_written(
    texts: list[str], base_model: Path, tmp_path: Path, method: str
) -> None:
    report = adapt(texts, base_model, tmp_path / "out", method=method)
    losses = [point.loss for point in report.curve if point.loss is not None]
    assert losses[-1] < losses[0]
    held_out = {point.step: point.held_out_loss for point in report.curve}
    assert list(held_out) == [0, 10, 20, 30, 40]
    assert report.held_out_loss == min(held_out.values()) == held_out[report.best_step]
    assert report.held_out_loss < report.held_out_loss_before == held_out[0]
    json.dumps(dataclasses.asdict(report))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_arguments_give_the_same_bytes(
    texts: list[str], base_model: Path, tmp_path: Path, method: str
) -> None:
    first = adapt(texts, base_model, tmp_path / "first", method=method, max_steps=12)
    torch.manual_seed(12345)  # the state outside must not matter
    second = adapt(texts, base_model, tmp_path / "second", method=method, max_steps=12)
    other = adapt(texts, base_model, tmp_path / "other", method=method, max_steps=12, seed=1)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert first.curve == second.curve != other.curve
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_how_often_validation_looks_does_not_change_the_trajectory(
    texts: list[str], base_model: Path, tmp_path: Path
) -> None:
    often = adapt(texts, base_model, tmp_path / "often", steps_between_validations=1, max_steps=10)
    once = adapt(texts, base_model, tmp_path / "once", max_steps=10)
    assert once.curve[-1].held_out_loss == often.curve[-1].held_out_loss


def test_output_is_a_base_model(texts: list[str], base_model: Path, tmp_path: Path) -> None:
    adapt(texts, base_model, tmp_path / "out", max_steps=10)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    before, after = load_pretrained(base_model), load_pretrained(tmp_path / "out")
    assert not torch.equal(before(IDS, MASK), after(IDS, MASK))
    again = adapt(texts, tmp_path / "out", tmp_path / "further", max_steps=10)
    assert again.held_out_loss <= again.held_out_loss_before


@pytest.mark.parametrize("method", METHODS)
def test_no_steps_change_nothing(
    texts: list[str], base_model: Path, tmp_path: Path, method: str
) -> None:
    report = adapt(texts, base_model, tmp_path / "out", method=method, max_steps=0)
    before = load_file(base_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (report.steps, report.best_step, report.texts_per_second) == (0, 0, 0.0)


def test_an_adaptation_that_only_harms_gives_the_encoder_back(
    texts: list[str], base_model: Path, tmp_path: Path
) -> None:
    report = adapt(texts, base_model, tmp_path / "out", learning_rate=10.0, warmup_share=0.0)
    assert report.best_step == 0
    before = load_file(base_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_chosen_layers_move(texts: list[str], base_model: Path, tmp_path: Path) -> None:
    adapt(texts, base_model, tmp_path / "out", tuned_layers=1, max_steps=10)
    before = load_file(base_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved)


def test_equal_texts_count_once(texts: list[str], base_model: Path, tmp_path: Path) -> None:
    once = adapt(texts, base_model, tmp_path / "once", max_steps=0)
    twice = adapt([*texts, *texts], base_model, tmp_path / "twice", max_steps=0)
    distinct = len(set(texts))
    assert once.texts + once.held_out_texts == twice.texts + twice.held_out_texts == distinct
    assert once.held_out_texts == round(distinct * 0.05)


def test_dropout_is_on_inside_and_off_afterwards(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    rates = [m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)]
    before = encoder(IDS, MASK)
    with active_dropout(encoder, 0.5):
        assert not torch.equal(encoder(IDS, MASK), encoder(IDS, MASK))
    assert torch.equal(encoder(IDS, MASK), before)
    with pytest.raises(RuntimeError), active_dropout(encoder, 0.5):
        raise RuntimeError
    assert torch.equal(encoder(IDS, MASK), before)
    assert not any(module.training for module in encoder.modules())
    assert rates == [m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)]


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_have_views_by_attention_dropout_but_no_masked_language(
    texts: list[str], base_model: Path, tmp_path: Path, family: str
) -> None:
    decoder = write_family(family, tmp_path / family, base_model / "tokenizer.json")
    encoder = load_pretrained(decoder)
    with active_dropout(encoder, 0.5):
        assert not torch.equal(encoder(IDS, MASK), encoder(IDS, MASK))
    with pytest.raises(
        ConfigError, match=rf"masked_language.* allowed: contrastive for a {family}"
    ):
        adapt(texts, decoder, tmp_path / "masked", method="masked_language")
    report = adapt(texts, decoder, tmp_path / "contrastive", max_steps=2)
    assert report.steps == 2


@pytest.mark.parametrize("family", ["modernbert", "distilbert", "electra", "mpnet", "roberta"])
@pytest.mark.parametrize("method", METHODS)
def test_other_encoders_adapt_by_both_methods(
    texts: list[str], base_model: Path, tmp_path: Path, family: str, method: str
) -> None:
    model = write_family(family, tmp_path / family, base_model / "tokenizer.json")
    report = adapt(texts, model, tmp_path / "out", method=method, max_steps=30)
    losses = [point.loss for point in report.curve if point.loss is not None]
    assert losses[-1] < losses[0]
    load_pretrained(tmp_path / "out")


def test_an_encoder_without_dropout_is_refused(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, torch.nn.Dropout):
            encoder.set_submodule(name, torch.nn.Identity())
    with pytest.raises(ConfigError, match="dropout"), active_dropout(encoder, 0.1):
        pass


def test_contrastive_loss_is_that_of_the_paper(base_model: Path) -> None:
    """Without noise both views are equal: cosines of the vectors over the temperature."""
    encoder = load_pretrained(base_model)
    ids = np.array([[2, 7, 8, 3], [2, 9, 10, 3], [2, 11, 7, 3]])
    mask = np.ones_like(ids, dtype=bool)
    loss = adaptation._Contrastive(encoder, 0.5).loss(ids, mask, make_rng(0))
    vectors = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).detach().numpy()
    scores = np.exp(vectors @ vectors.T / 0.5)
    expected = -np.log(np.diag(scores) / scores.sum(1)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def masked_language(encoder: TextEncoder) -> adaptation._MaskedLanguage:
    return adaptation._MaskedLanguage(encoder, 4, frozenset({2, 3}), 0.15)


def test_masking_follows_bert(base_model: Path) -> None:
    ids = make_rng(0, "ids").integers(5, 40, (2000, 20))
    ids[:, 0], ids[:, -1] = 2, 3
    maskable = ~np.isin(ids, [2, 3])
    objective = masked_language(load_pretrained(base_model))
    corrupted, chosen = objective._corrupt(ids, maskable, make_rng(0))
    assert not chosen[:, [0, -1]].any()
    assert chosen.any(1).all()
    assert (corrupted[~chosen] == ids[~chosen]).all()
    # 36,000 maskable tokens; each text has at least one, which 5 % of texts would otherwise lack.
    share = chosen[maskable].mean()
    assert share == pytest.approx(0.15 + 0.85**18 / 18, abs=0.006)
    hidden = (corrupted[chosen] == 4).mean()
    kept = (corrupted[chosen] == ids[chosen]).mean()
    # A change draws from all 40 tokens: one in 40 is the mask, one in 40 the token itself.
    assert hidden == pytest.approx(0.8 + 0.1 / 40, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 40, abs=0.02)


def test_masked_language_head_is_tied_to_the_embeddings(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    objective = masked_language(encoder)
    ids = np.array([[2, 7, 8, 9, 3]])
    objective.loss(ids, np.ones_like(ids, dtype=bool), make_rng(0)).backward()
    table = encoder.transformer.get_input_embeddings().weight
    assert (table.grad.abs().sum(1) > 0).all()  # also of tokens that are not in the batch
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_nan_names_the_texts(
    texts: list[str], base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = adaptation._Contrastive.loss

    def lost(self, ids, mask, rng):
        return loss(self, ids, mask, rng) * (torch.nan if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(adaptation._Contrastive, "loss", lost)
    with pytest.raises(PermanentError, match=r"loss nan .* at step 1, texts \[\d+, \d+"):
        adapt(texts, base_model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_tracker_hears_parameters_and_losses(
    texts: list[str], base_model: Path, tmp_path: Path
) -> None:
    class Recorder(NullTracker):
        def __init__(self) -> None:
            self.params: dict[str, object] = {}
            self.steps: dict[str, list[int]] = {}

        def log_params(self, params) -> None:
            self.params |= params

        def log_metrics(self, metrics, step) -> None:
            for name in metrics:
                self.steps.setdefault(name, []).append(step)

    recorder = Recorder()
    adapt(texts, base_model, tmp_path / "out", recorder, max_steps=20)
    assert recorder.params["method"] == "contrastive"
    assert recorder.steps == {"loss": list(range(1, 21)), "held_out_loss": [10, 20]}


def test_too_few_texts_are_refused(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="2 distinct texts are too few"):
        adapt(["sea1 sea2", "war1", "sea1 sea2", ""], base_model, tmp_path / "out")


def test_longer_texts_than_the_encoder_has_positions_for_are_refused(
    texts: list[str], base_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="max_tokens = 33 is not allowed; allowed: at most 32"):
        adapt(texts, base_model, tmp_path / "out", max_tokens=33)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "magic"),
        ("tuned_layers", 0),
        ("max_tokens", 2),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("epochs", 0),
        ("max_steps", -1),
        ("batch_size", 1),
        ("dropout", 0.0),
        ("dropout", 1.0),
        ("masked_share", 1.0),
        ("temperature", 0.0),
        ("precision", "fp16"),
        ("steps_between_validations", 0),
        ("threads", 0),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        AdaptationConfig(**{key: value})
