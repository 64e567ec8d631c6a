"""The chain that meets a budget, as an artifact: made, measured and judged on validation."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

import numpy as np

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import COMPRESSED
from recflow.adapters.models import build_variant, open_models, without_test
from recflow.adapters.snapshots import Snapshot as StoredSnapshot
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.budget import (
    Budget,
    Candidate,
    ChainSpace,
    EncoderSize,
    Trial,
    best_trial,
    candidates,
    excesses,
    worth_making,
)
from recflow.compression.family import ROOT, Family, with_deployment
from recflow.compression.measure import MeasurementConfig, measure, serving_bytes
from recflow.core.artifacts import MANIFEST_NAME, Artifact, Draft, JsonValue
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ParityError
from recflow.core.measurement import Measurement
from recflow.data.split import Claim
from recflow.evaluation.evaluator import Estimate, EvaluationConfig, evaluate
from recflow.evaluation.scoring import Predictions, Snapshot, predict
from recflow.modeling.batching import items_in_use
from recflow.modeling.encoder import WEIGHTS_NAME
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.low_rank import token_table
from recflow.modeling.ranker import count_parameters, load_encoder, load_parts, load_ranker
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer
from recflow.modeling.tracking import NullTracker, Tracker

logger = logging.getLogger("recflow.compression")

_FOLDER: Final = "searched"
_ROOT_FAMILY: Final = Family(MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class BudgetSearchConfig:
    """How long and how carefully to search.

    Attributes:
        minutes: No further chain is begun after this time.
        stop_at_first: Whether to stop at the first chain that meets the budget; the chains are
            tried from the gentlest on, so that a later one seldom loses less.
        bootstrap_samples: Resamples behind the interval of the AUC loss.
        texts: Catalogue texts that are measured with.
        seed: Seed of every step and of the resamples.
        threads: Threads of the steps; latency is measured on one.
    """

    minutes: float = 30.0
    stop_at_first: bool = True
    bootstrap_samples: int = 1_000
    texts: int = 256
    seed: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        for key in ("minutes", "bootstrap_samples", "texts", "threads"):
            if not getattr(self, key) > 0:
                raise ConfigError.of(key, getattr(self, key), "above 0")


def build_compressed(
    store: ArtifactStore,
    snapshot: str,
    *,
    budget: Budget,
    space: ChainSpace,
    config: BudgetSearchConfig,
    tracker: Tracker,
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Search the chain of steps that meets a budget and store the model it ends with.

    Every chain is judged on validation, never on test. Its models stay stored below ``searched``:
    a search that was killed, or is asked again with another budget, makes none of them twice. If
    no chain meets the budget the nearest one is stored, and the facts say so.

    Args:
        store: Where the fine-tuned model is.
        snapshot: Partition of the snapshot.
        budget: The limits.
        space: The chains to try.
        config: How long and how carefully.
        tracker: Told the costs of every chain.
        code_version: Version of the searching code.
        rebuild: Search again what was searched.

    Raises:
        ArtifactError: The fine-tuned model is missing, altered, or was made from other splits.
        ConfigError: The space does not fit the model, or not one chain could be made.
    """
    data = load_snapshot(store, snapshot)
    root = open_models(store, snapshot, data, _ROOT_FAMILY)[ROOT]
    chains = candidates(space, _encoder_size(root.path, data))
    parents = {**without_test(data), root.manifest.key: root}

    def search(draft: Draft) -> None:
        started = time.monotonic()
        judge = _Judge(store, snapshot, data, root, config)
        trials: list[Trial] = []
        for number, chain in enumerate(chains):
            if time.monotonic() - started > config.minutes * 60:
                late = f"not begun within {config.minutes:g} minutes"
                trials += [_unmade(chain, late) for chain in chains[number:]]
                break
            if not worth_making(chain, budget):
                trials.append(_unmade(chain, "too large by the forecast"))
                continue
            trials.append(judge.trial(chain))
            _tell(tracker, trials[-1], len(trials))
            if trials[-1].costs and not excesses(trials[-1], budget) and config.stop_at_first:
                trials += [_unmade(chain, "not needed") for chain in chains[number + 1 :]]
                break
        if not any(trial.costs for trial in trials):
            # Nothing has a chance: show what the smallest chain gives.
            smallest = min(range(len(chains)), key=lambda n: chains[n].megabytes)
            trials[smallest] = judge.trial(chains[smallest])
        best, meets = best_trial(trials, budget)
        if best is None:
            reasons = "; ".join(sorted({trial.note for trial in trials}))
            raise ConfigError(f"not one of {len(trials)} chains could be made: {reasons}")
        chosen = next(chain for chain in chains if chain.name == best.name)
        _copy_model(judge.made[chosen.name], draft.path)
        draft.facts |= {
            "chain": list(best.steps),
            "meets_budget": meets,
            "exceeded": cast("JsonValue", excesses(best, budget)),
            "budget": cast("JsonValue", budget.limits),
            "costs": cast("JsonValue", dict(best.costs)),
            "validation_auc": best.validation_auc,
            "trials": [cast("JsonValue", asdict(trial)) for trial in trials],
            "seconds": time.monotonic() - started,
        }

    return store.build(
        COMPRESSED,
        snapshot,
        search,
        code_version=code_version,
        parents=parents,
        config=cast(
            "dict[str, JsonValue]",
            {"budget": budget.limits, "space": asdict(space), **asdict(config)},
        ),
        rebuild=rebuild,
    )


def budget_table(compressed: Artifact) -> str:
    """The trials of a search as a Markdown table, the chosen one marked."""
    facts = compressed.facts
    limits = cast("dict[str, float]", facts["budget"])
    chosen = cast("list[str]", facts["chain"])
    head = ["chain", *limits, "AUC loss, interval", "validation AUC", "texts/s", "note"]
    lines = [head, ["---"] * len(head)]
    lines.append(["*budget*", *(f"{limit:.4g}" for limit in limits.values()), "", "", "", ""])
    for trial in cast("list[dict[str, object]]", facts["trials"]):
        costs = cast("dict[str, float]", trial["costs"])
        interval = cast("Sequence[float] | None", trial["auc_loss_interval"])
        name = " → ".join(cast("list[str]", trial["steps"]))
        numbers = [_cell(costs.get(limit)) for limit in limits]
        lines.append(
            [
                f"**{name}**" if trial["steps"] == chosen else name,
                *numbers,
                "–" if interval is None else f"{interval[0]:+.2%} … {interval[1]:+.2%}",
                _cell(cast("float | None", trial["validation_auc"])),
                _cell(cast("float | None", trial["texts_per_second"])),
                str(trial["note"]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def budget_claim(compressed: Artifact) -> Claim:
    """Claim that the model meets its budget."""
    facts = compressed.facts
    over = cast("dict[str, float]", facts["exceeded"])
    chain = " → ".join(cast("list[str]", facts["chain"]))
    broken = ", ".join(f"{name} by {excess:.1%}" for name, excess in over.items())
    return Claim(
        name="meets_budget",
        holds=bool(facts["meets_budget"]),
        description=f"{chain} meets the budget"
        if not over
        else f"no chain meets the budget; the nearest, {chain}, exceeds {broken}",
        facts={f"exceeds_{name}": excess for name, excess in over.items()},
        examples=[],
    )


class _Judge:
    """Makes chains, and compares what they cost with the fine-tuned model."""

    def __init__(
        self,
        store: ArtifactStore,
        snapshot: str,
        data: StoredSnapshot,
        root: Artifact,
        config: BudgetSearchConfig,
    ) -> None:
        self._store, self._partition, self._config = store, snapshot, config
        self._root = root
        self._texts: list[str] = data.items[Columns.TEXT].gather_every(
            max(1, data.items.height // config.texts)
        ).to_list()  # fmt: skip
        splits = data.splits
        # Judged as if validation were the test: the search never sees the test split.
        self._snapshot = Snapshot(
            items=data.items,
            train=splits.train,
            validation=splits.validation,
            test=splits.validation,
        )
        self._reference = self._predictions(ROOT, root.path)
        self.made: dict[str, Artifact] = {}

    def trial(self, chain: Candidate) -> Trial:
        """Make the chain's models, measure and judge the last one."""
        logger.info("trying %s", chain.name)
        family = chain.family(_FOLDER)
        steps = _steps_of(chain)
        try:
            for name, variant in family.variants.items():
                self.made[name] = build_variant(
                    self._store,
                    self._partition,
                    family,
                    name,
                    config=with_deployment(
                        variant.config, seed=self._config.seed, threads=self._config.threads
                    ),
                    tracker=NullTracker(),
                    code_version=variant.step.code_version,
                )
        except (ConfigError, ParityError) as error:
            return _unmade(chain, str(error))
        path = self.made[chain.name].path
        # Beside the root, in turn: the machine's mood touches both.
        cost = measure({ROOT: self._root.path, chain.name: path}, self._texts, MeasurementConfig())
        root_auc, auc, difference = self._compare(chain.name, path)
        low, high = difference.low, difference.high
        return Trial(
            name=chain.name,
            steps=steps,
            forecast_megabytes=chain.megabytes,
            costs={
                **_costs(cost[-1]),
                "max_auc_loss": -difference.value / root_auc,
            },
            auc_loss_interval=(
                None if low is None or high is None else (-high / root_auc, -low / root_auc)
            ),
            validation_auc=auc,
            texts_per_second=cost[-1].texts_per_second,
        )

    def _compare(self, name: str, path: Path) -> tuple[float, float, Estimate]:
        """Validation AUC of the root and of a model, and their paired difference."""
        board = self._reference.board
        evaluation = evaluate(
            [self._reference, self._predictions(name, path)],
            self._snapshot,
            EvaluationConfig(
                bootstrap_samples=self._config.bootstrap_samples,
                seed=self._config.seed,
                references={board: ROOT},
                parents={name: ROOT},
            ),
        )
        results = {result.name: result for result in evaluation.scorers}
        to_root = results[name].parent
        assert to_root is not None
        return (
            results[ROOT].metrics["auc"].value,
            results[name].metrics["auc"].value,
            to_root.differences["auc"],
        )

    def _predictions(self, name: str, path: Path) -> Predictions:
        scorer = load_ranker(path, threads=self._config.threads).scorer(name, self._snapshot.items)
        return predict(scorer, self._snapshot, catalogue_sample=0, seed=self._config.seed)


def _encoder_size(root: Path, data: StoredSnapshot) -> EncoderSize:
    described = read_ranker_config(root)
    encoder, parts = load_encoder(root, described), load_parts(root, described)
    used = items_in_use(data.items, [data.splits.train], parts.user_model.shape.history_length)
    tokenizer = TextTokenizer(root / TOKENIZER_NAME, parts.max_tokens)
    occurring = np.unique(np.concatenate([np.array(ids) for ids in tokenizer(used.texts)]))
    table = token_table(encoder.transformer).weight.numel()
    layers = count_parameters(encoder.layers)
    return EncoderSize(
        layers=len(encoder.layers),
        layer_weights=layers,
        table_weights=table,
        table_share=len(occurring) / int(encoder.config.vocab_size),
        other_weights=count_parameters(encoder) - layers - table,
        beside_bytes=serving_bytes(root) - (root / WEIGHTS_NAME).stat().st_size,
    )


def _costs(measurement: Measurement) -> dict[str, float]:
    """Measured values under the names of the limits."""
    single = next(latency for latency in measurement.latencies if latency.batch_size == 1)
    return {
        "max_megabytes": measurement.serving_bytes / 1e6,
        "max_p99_ms": single.p99,
        "max_memory_mib": measurement.peak_rss_bytes / 2**20,
    }


def _steps_of(chain: Candidate) -> tuple[str, ...]:
    """The steps in words, with what differs from their defaults."""
    words: list[str] = []
    for table in chain.tables.values():
        options = [str(v) for k, v in table.items() if k not in ("parent", "step")]
        words.append(" ".join([str(table["step"]), *options]))
    return tuple(words)


def _unmade(chain: Candidate, note: str) -> Trial:
    return Trial(chain.name, _steps_of(chain), chain.megabytes, note=note)


def _tell(tracker: Tracker, trial: Trial, number: int) -> None:
    tracker.log_metrics(
        {name.removeprefix("max_"): value for name, value in trial.costs.items()}, step=number
    )


def _copy_model(model: Artifact, folder: Path) -> None:
    for name in model.manifest.files:
        if name != MANIFEST_NAME:
            shutil.copyfile(model.path / name, folder / name)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
