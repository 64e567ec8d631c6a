"""A study of the fine-tuning strategies: what each of them costs and gains on one snapshot.

Each strategy is trained in a process of its own, so that its peak memory is its own, with nothing
kept from the others: same data, same epochs, same seed, and the hidden states computed anew.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import STRATEGIES_STUDY
from recflow.adapters.models import weights_hash
from recflow.adapters.planning import PlanningConfig, require_training
from recflow.adapters.snapshots import load_snapshot
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.errors import ConfigError, PermanentError
from recflow.evaluation.evaluator import Estimate, Evaluation, EvaluationConfig, evaluate
from recflow.evaluation.scoring import Predictions, Snapshot
from recflow.modeling.config import STRATEGIES, TrainingConfig, with_values
from recflow.modeling.reports import TrainingReport
from recflow.modeling.search_space import Value
from recflow.modeling.tracking import Tracker

logger = logging.getLogger("recflow.training")

REFERENCE: Final = "frozen"
_PROCESS = "recflow.adapters.strategy_process"
_METRICS: Final = ("auc", "ndcg@10")


@dataclass(frozen=True, slots=True)
class StrategiesConfig:
    """What is compared.

    Attributes:
        strategies: Strategies to train; ``frozen``, which the others are compared with, among them.
        overrides: By strategy, what differs from the common configuration, by dotted key.
        bootstrap_samples: Resamples behind each interval.
    """

    strategies: tuple[str, ...] = STRATEGIES
    overrides: Mapping[str, Mapping[str, Value]] = field(default_factory=lambda: {})
    bootstrap_samples: int = 1_000

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        for strategy in (*self.strategies, *self.overrides):
            if strategy not in STRATEGIES:
                raise ConfigError.of("strategy", strategy, ", ".join(STRATEGIES))
        if REFERENCE not in self.strategies or len(set(self.strategies)) < len(self.strategies):
            raise ConfigError.of(
                "strategies", list(self.strategies), f"each once, {REFERENCE} among them"
            )
        if self.bootstrap_samples < 1:
            raise ConfigError.of("bootstrap_samples", self.bootstrap_samples, "1 or more")


def build_strategies(
    store: ArtifactStore,
    snapshot: str,
    *,
    base_model: Path,
    config: TrainingConfig,
    study: StrategiesConfig,
    tracker: Tracker,
    code_version: str,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Train every strategy on a snapshot, score its test split, and compare.

    The artifact holds the predictions; its facts hold the table, see :func:`strategies_table`.

    Args:
        store: Where the snapshot is.
        snapshot: Partition of the snapshot.
        base_model: Hugging Face directory of the pretrained encoder.
        config: What the strategies have in common.
        study: What is compared.
        tracker: Told the AUC of every strategy.
        code_version: Version of the comparing code.
        planning: What the trainings are planned with, and what follows where memory is short.
        rebuild: Train again what was trained.

    Raises:
        ArtifactError: The pretrained encoder or the snapshot is missing or not whole.
        ConfigError: An override has an unknown key or an impossible value.
        HardwareError: A strategy needs more memory than there is; none was begun.
        PermanentError: A strategy cannot be trained; names it and says why.
    """
    data = load_snapshot(store, snapshot)
    configs = {
        strategy: with_values(config, {**study.overrides.get(strategy, {}), **_of(strategy)})
        for strategy in study.strategies
    }

    def compare(draft: Draft) -> None:
        for own in configs.values():
            require_training(
                data,
                base_model=base_model,
                config=own,
                planning=planning or PlanningConfig(),
                in_new_process=True,
            )
        reports: dict[str, TrainingReport] = {}
        for strategy, own in configs.items():
            logger.info("training with the strategy %s", strategy)
            job = {
                "store": str(store.root.absolute()),
                "snapshot": snapshot,
                "base_model": str(base_model.absolute()),
                "config": asdict(own),
                "output": str(draft.path.absolute()),
            }
            reports[strategy] = _train(strategy, job)
        evaluation = evaluate(
            [Predictions.load(draft.path / strategy) for strategy in configs],
            Snapshot(
                items=data.items,
                train=data.splits.train,
                validation=data.splits.validation,
                test=data.splits.test,
            ),
            EvaluationConfig(
                bootstrap_samples=study.bootstrap_samples,
                seed=config.seed,
                references={"content-only": REFERENCE},
            ),
        )
        draft.facts |= {
            "primary_metric": config.schedule.primary_metric,
            "test_impressions": evaluation.counts.evaluated,
            "confidence": evaluation.config.confidence,
            "rows": [
                _row(strategy, configs[strategy], report, evaluation)
                for strategy, report in reports.items()
            ],
        }

    artifact = store.build(
        STRATEGIES_STUDY,
        snapshot,
        compare,
        code_version=code_version,
        parents=data.artifacts,
        config=cast(
            "dict[str, JsonValue]",
            {
                "configs": {strategy: asdict(own) for strategy, own in configs.items()},
                "bootstrap_samples": study.bootstrap_samples,
                "base_model_sha256": weights_hash(base_model),
            },
        ),
        rebuild=rebuild,
    )
    for row in _rows(artifact):
        tracker.log_metrics({f"{row['strategy']}.auc": row["auc"]["value"]}, step=0)
    return artifact


def strategies_table(study: Artifact) -> str:
    """The comparison as a Markdown table, in the order the strategies were trained."""
    facts = study.facts
    heads = ["strategy", "learns", "of", "encoder rate", "s", "clicks/s", "peak RSS"]
    heads += [f"validation {facts['primary_metric']}", "test AUC", "nDCG@10"]
    heads += [f"AUC over {REFERENCE}"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    lines += [
        [
            str(row["strategy"]),
            f"{row['trainable_parameters']:,}",
            f"{row['parameters']:,}",
            "–" if row["strategy"] == REFERENCE else f"{row['encoder_learning_rate']:.0e}",
            f"{row['seconds']:.0f}",
            f"{row['clicks_per_second']:.0f}",
            f"{row['peak_rss_bytes'] / 2**20:,.0f} MiB",
            f"{row['validation']:.4f}",
            *(_interval(row[metric]) for metric in _METRICS),
            _interval(row["gain"], signed=True) if row["gain"] else "–",
        ]
        for row in _rows(study)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of(strategy: str) -> dict[str, str]:
    return {"tuning.strategy": strategy}


def _train(strategy: str, job: Mapping[str, Any]) -> TrainingReport:
    done = subprocess.run(
        [sys.executable, "-m", _PROCESS],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stdout.strip() or f"its process ended with status {done.returncode}"
        raise PermanentError(f"the strategy {strategy} cannot be trained: {reason}")
    return TrainingReport.from_dict(json.loads(done.stdout.splitlines()[-1]))


def _row(
    strategy: str, config: TrainingConfig, report: TrainingReport, evaluation: Evaluation
) -> dict[str, JsonValue]:
    result = evaluation[strategy]
    gain = result.reference.differences["auc"] if result.reference else None
    return {
        "strategy": strategy,
        "encoder_learning_rate": config.optimiser.encoder_learning_rate,
        "trainable_parameters": report.trainable_parameters,
        "parameters": report.parameters,
        "seconds": report.seconds,
        "clicks_per_second": report.impressions_per_second,
        "peak_rss_bytes": report.peak_rss_bytes,
        "validation": report.best_validation,
        "gain": _as_json(gain) if gain else None,
        **{metric: _as_json(result.metrics[metric]) for metric in _METRICS},
    }


def _as_json(estimate: Estimate) -> dict[str, JsonValue]:
    return {**asdict(estimate)}


def _rows(study: Artifact) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", study.facts["rows"])


def _interval(estimate: Mapping[str, float], *, signed: bool = False) -> str:
    shape = "+.4f" if signed else ".4f"
    return f"{estimate['value']:{shape}} [{estimate['low']:{shape}}, {estimate['high']:{shape}}]"
