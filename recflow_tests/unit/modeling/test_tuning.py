import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.config import STRATEGIES as CONFIGURABLE
from recflow.modeling.config import TuningConfig
from recflow.modeling.encoder import (
    TextEncoder,
    build_encoder,
    describe_encoder,
    load_pretrained,
    load_weights,
    save_encoder,
    weights_digest,
)
from recflow.modeling.tuning import (
    STRATEGIES,
    AdaptiveLowRank,
    Tuning,
    apply_strategy,
    layer_of,
)
from recflow_tests.unit.modeling.families import (
    CONFIGS,
    LAYERS,
    ROWS,
    padded_batch,
    write_family,
)

IDS, MASK = padded_batch()
STEPS = 20


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> dict[str, Path]:
    tokenizer = base_model / "tokenizer.json"
    return {
        family: write_family(family, tmp_path_factory.mktemp(family), tokenizer)
        for family in CONFIGS
    }


def _tuned(
    directory: Path, strategy: str, *, pooling: str = "auto", tuned_layers: int = 2
) -> tuple[TextEncoder, Tuning]:
    config = TuningConfig(
        strategy, tuned_layers, rank=2, initial_rank=4, alpha=8.0, adapter_width=6
    )
    encoder = load_pretrained(directory, pooling=pooling)
    torch.manual_seed(5)
    return encoder, apply_strategy(config, encoder)


def _optimiser(encoder: TextEncoder, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=rate)


def _step(
    encoder: TextEncoder, tuning: Tuning, optimiser: torch.optim.Optimizer, number: int
) -> None:
    """Pull the vectors towards directions that change from step to step."""
    direction = torch.randn(4, 32, generator=torch.Generator().manual_seed(number))
    loss = -(encoder(IDS, MASK) * direction).sum()
    penalty = tuning.penalty()
    (loss if penalty is None else loss + penalty).backward()
    optimiser.step()
    tuning.after_step(number)
    optimiser.zero_grad(set_to_none=True)


def _state(encoder: TextEncoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def _vectors(encoder: TextEncoder) -> Tensor:
    with torch.no_grad():
        return encoder(IDS, MASK)


def test_every_configurable_strategy_is_there() -> None:
    assert set(STRATEGIES) == set(CONFIGURABLE)


@pytest.mark.parametrize("strategy", CONFIGURABLE)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_strategy_changes_what_it_says_and_is_stored(
    directories: dict[str, Path], family: str, strategy: str, tmp_path: Path
) -> None:
    plain_names = {name for name, _ in load_pretrained(directories[family]).named_parameters()}
    encoder, tuning = _tuned(directories[family], strategy, pooling="attention")
    tuning.start(STEPS)
    before, vectors = _state(encoder), _vectors(encoder)
    constant = tuning.constant_layers
    assert constant == {"frozen": LAYERS, "full": None}.get(strategy, LAYERS - 2)
    with torch.no_grad():
        below = encoder.run_layers(encoder.embed(IDS), MASK, 0, constant or 0)

    if constant != LAYERS:
        optimiser = _optimiser(encoder)
        for number in (1, 2):  # factors that start at zero let others learn in the second step
            _step(encoder, tuning, optimiser, number)

    changed = {n for n, v in _state(encoder).items() if not torch.equal(v, before[n])}
    assert _without_idle(changed) == _without_idle(_learning(encoder, strategy, plain_names))
    with torch.no_grad():
        again = encoder.run_layers(encoder.embed(IDS), MASK, 0, constant or 0)
    assert torch.equal(again, below) == (strategy != "full")
    assert torch.allclose(_vectors(encoder), vectors) == (strategy == "frozen")

    tuned = _vectors(encoder)
    tuning.merge()
    torch.testing.assert_close(_vectors(encoder), tuned, atol=1e-5, rtol=0)
    if strategy != "adapters":
        names = {name for name, _ in encoder.named_parameters()}
        assert names == plain_names | {"transformer.recflow.pooling.query"}
    save_encoder(encoder, tmp_path / "model.safetensors")
    loaded = build_encoder(json.loads(json.dumps(describe_encoder(encoder))))
    load_weights(loaded.transformer, tmp_path / "model.safetensors")
    assert torch.equal(_vectors(loaded), _vectors(encoder))


def _learning(encoder: TextEncoder, strategy: str, plain: set[str]) -> set[str]:
    """Names of the weights a strategy should change, from their names alone."""
    query = "transformer.recflow.pooling.query"
    names = {name for name, _ in encoder.named_parameters()}
    upper = {n for n in names if 2 <= layer_of(encoder, n) <= LAYERS}
    match strategy:
        case "frozen":
            return set()
        case "full":
            return plain | {query}
        case "top_k_layers":
            norms = {"transformer.final_norm.weight", "transformer.norm.weight"} & plain
            return upper | norms | {query}
        case "lora" | "adalora":
            return {n for n in upper if "lora_" in n} | {query}
        case _:
            return {n for n in upper if ".adapters." in n} | {query}


def _without_idle(names: set[str]) -> set[str]:
    """Without biases of keys, which softmax cancels: they move by rounding, if at all."""
    return {n for n in names if not n.endswith(("key.bias", "k_lin.bias", "k.bias"))}


def _ranks(encoder: TextEncoder) -> int:
    """Rank left over all matrices."""
    return sum(int(v.count_nonzero()) for n, v in encoder.state_dict().items() if ".lora_E." in n)


def _matrices(encoder: TextEncoder) -> int:
    return sum(".lora_E." in name for name in encoder.state_dict())


@pytest.mark.parametrize("steps", [4, 5, 10, STEPS, 33])
def test_adalora_reaches_its_final_rank(directories: dict[str, Path], steps: int) -> None:
    encoder, tuning = _tuned(directories["bert"], "adalora")
    tuning.start(steps)
    optimiser, ranks = _optimiser(encoder), []
    for number in range(1, steps + 1):
        _step(encoder, tuning, optimiser, number)
        ranks.append(_ranks(encoder))
    # Query, key, value, attention's output and the two of the feed-forward part in two layers;
    # ranks start at 4 each and are to be 2 in the mean, for the last three tenths of the steps.
    assert _matrices(encoder) == 12
    assert ranks[0] == 12 * 4 if steps >= 10 else ranks[0] <= 12 * 4
    last_cut = steps - max(1, int(steps * 0.3))
    assert set(ranks[last_cut - 1 :]) == {12 * 2}
    assert min(ranks) == 12 * 2
    tuned = _vectors(encoder)
    tuning.merge()
    torch.testing.assert_close(_vectors(encoder), tuned, atol=1e-5, rtol=0)


def test_adalora_needs_steps_to_judge_by(directories: dict[str, Path]) -> None:
    _, tuning = _tuned(directories["bert"], "adalora")
    with pytest.raises(ConfigError, match="steps = 3 is not allowed; allowed: at least 4"):
        tuning.start(3)


def test_the_penalty_is_the_mean_distance_from_orthogonal_factors(
    directories: dict[str, Path],
) -> None:
    encoder, tuning = _tuned(directories["bert"], "adalora", tuned_layers=1)
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if ".lora_A." in name:  # 4 × inputs: A Aᵀ = 0, at distance √4 from one
                value.zero_()
            elif ".lora_B." in name:  # outputs × 4 with orthogonal columns of length 2: 4 - 1 = 3
                value.copy_(2 * torch.eye(*value.shape))
    penalty = tuning.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.1 * (2.0 + 3 * 2.0) / 2)


@pytest.mark.parametrize("stop", [1, 9, 14, 17])
def test_adalora_continues_bit_for_bit(directories: dict[str, Path], stop: int) -> None:
    encoder, tuning = _tuned(directories["bert"], "adalora")
    tuning.start(STEPS)
    optimiser = _optimiser(encoder)
    for number in range(1, stop + 1):
        _step(encoder, tuning, optimiser, number)
    weights, state = _state(encoder), {n: v.clone() for n, v in tuning.state().items()}

    resumed, again = _tuned(directories["bert"], "adalora")
    again.start(STEPS)
    resumed.load_state_dict(weights)
    again.load_state(state)
    second = _optimiser(resumed)
    for number in range(stop + 1, STEPS + 1):
        _step(encoder, tuning, optimiser, number)
        _step(resumed, again, second, number)
    assert all(torch.equal(v, _state(resumed)[n]) for n, v in _state(encoder).items())
    assert again.state().keys() == tuning.state().keys()
    assert isinstance(again, AdaptiveLowRank)


def test_lora_keeps_nothing_beside_its_weights(directories: dict[str, Path]) -> None:
    _, tuning = _tuned(directories["bert"], "lora")
    tuning.start(STEPS)
    assert tuning.penalty() is None
    assert tuning.state() == {}


@pytest.mark.parametrize("strategy", [s for s in CONFIGURABLE if s not in ("frozen", "full")])
def test_more_layers_than_there_are_is_refused(directories: dict[str, Path], strategy: str) -> None:
    with pytest.raises(ConfigError, match="tuned_layers = 4 is not allowed; allowed: 1 to 3"):
        _tuned(directories["bert"], strategy, tuned_layers=4)


@pytest.mark.parametrize(
    ("family", "name", "layer"),
    [
        ("bert", "transformer.embeddings.word_embeddings.weight", 0),
        ("bert", "transformer.encoder.layer.0.output.dense.weight", 1),
        ("bert", "transformer.encoder.layer.2.output.dense.weight", 3),
        ("mpnet", "transformer.encoder.relative_attention_bias.weight", 0),
        ("electra", "transformer.embeddings_project.weight", 0),
        ("llama", "transformer.layers.1.mlp.up_proj.weight", 2),
        ("llama", "transformer.norm.weight", 4),
        ("modernbert", "transformer.final_norm.weight", 4),
        ("bert", "transformer.recflow.pooling.query", 4),
        ("bert", "transformer.recflow.adapters.1.up.weight", 2),
    ],
)
def test_the_layer_of_a_weight(
    directories: dict[str, Path], family: str, name: str, layer: int
) -> None:
    encoder, _ = _tuned(directories[family], "adapters", pooling="attention")
    assert name in dict(encoder.named_parameters())
    assert layer_of(encoder, name) == layer


def test_the_projection_learns_with_the_top_and_not_below(directories: dict[str, Path]) -> None:
    transformer = load_pretrained(directories["bert"]).transformer
    plain = weights_digest(TextEncoder(transformer), LAYERS)
    encoder = TextEncoder(transformer, projection=8)
    name = "transformer.recflow.projection.weight"
    assert layer_of(encoder, name) == LAYERS + 1
    assert weights_digest(encoder, LAYERS) == plain
    apply_strategy(TuningConfig("top_k_layers", tuned_layers=1), encoder)
    assert dict(encoder.named_parameters())[name].requires_grad


def test_the_digest_covers_what_the_hidden_states_depend_on(directories: dict[str, Path]) -> None:
    digests = {
        below: weights_digest(load_pretrained(directories["bert"]), below)
        for below in range(LAYERS + 1)
    }
    assert len(set(digests.values())) == LAYERS + 1
    for strategy in CONFIGURABLE:  # what a strategy adds above does not change it
        encoder, _ = _tuned(directories["bert"], strategy, pooling="attention")
        assert weights_digest(encoder, 1) == digests[1], strategy
    encoder = load_pretrained(directories["bert"])
    with torch.no_grad():
        encoder.layers[1].output.dense.weight[0, 0] += 1
    changed = [below for below in digests if weights_digest(encoder, below) != digests[below]]
    assert changed == [2, 3]
    with torch.no_grad():
        encoder.transformer.embeddings.word_embeddings.weight[ROWS - 1, 0] += 1
    assert all(weights_digest(encoder, below) != digests[below] for below in digests)


def test_adapters_start_as_nothing(directories: dict[str, Path]) -> None:
    encoder, _ = _tuned(directories["llama"], "adapters")
    assert torch.equal(_vectors(encoder), _vectors(load_pretrained(directories["llama"])))
    assert list(encoder.adapters) == ["1", "2"]


def test_an_encoder_with_lora_is_not_stored_before_it_is_merged(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    encoder, tuning = _tuned(directories["bert"], "lora")
    with pytest.raises(ArtifactError, match="merge"):
        save_encoder(encoder, tmp_path / "model.safetensors")
    tuning.merge()
    save_encoder(encoder, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_pretrained(directories["bert"]).transformer.state_dict()
    )
