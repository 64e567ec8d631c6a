"""A study of learning with few labels: rankers from two encoders and several shares of clicks."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import ADAPTED_ENCODER, LABEL_EFFICIENCY_STUDY
from recflow.adapters.models import weights_hash
from recflow.adapters.planning import PlanningConfig, require_training
from recflow.adapters.snapshots import load_snapshot
from recflow.adapters.training_inputs import adapted_encoder
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError
from recflow.evaluation.evaluator import Estimate, EvaluationConfig
from recflow.evaluation.label_efficiency import (
    METRICS,
    LabelShare,
    Start,
    judge_label_efficiency,
    nested_sample,
    scorer_name,
)
from recflow.evaluation.scoring import Predictions, Snapshot, predict
from recflow.modeling.config import TrainingConfig
from recflow.modeling.ranker import load_ranker
from recflow.modeling.tracking import NullTracker, Tracker
from recflow.modeling.trainer import train_ranker

logger = logging.getLogger("recflow.training")


@dataclass(frozen=True, slots=True)
class LabelEfficiencyConfig:
    """What is compared.

    Attributes:
        shares: Shares of the training impressions whose clicks are learnt from.
        most_repeats: How often an impression of a small share may be shown in an epoch, so that
            fewer labels do not also mean fewer steps.
        bootstrap_samples: Resamples behind each interval.
    """

    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    most_repeats: int = 10
    bootstrap_samples: int = 1_000

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        distinct = len(set(self.shares)) == len(self.shares)
        if not self.shares or not distinct or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError.of(
                "shares", list(self.shares), "distinct ones above 0 and at most 1, at least one"
            )
        for key in ("most_repeats", "bootstrap_samples"):
            if getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "1 or more")


def build_label_efficiency(
    store: ArtifactStore,
    snapshot: str,
    *,
    base_model: Path,
    config: TrainingConfig,
    study: LabelEfficiencyConfig,
    tracker: Tracker,
    code_version: str,
    cache_directory: Path | None = None,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Train from the pretrained and the adapted encoder with few and many labels, and compare.

    Validation, which chooses the epoch, is whole for every ranker. The artifact holds the
    predictions; its facts hold the table, see :func:`label_shares`.

    Args:
        store: Where the snapshot and the adapted encoder are.
        snapshot: Partition of the snapshot.
        base_model: Hugging Face directory of the pretrained encoder.
        config: How every ranker is trained.
        study: What is compared.
        tracker: Told what adapting gained at each share.
        code_version: Version of the comparing code.
        cache_directory: Where hidden states are kept (see ``train_ranker``).
        planning: What a training on all labels is planned with, and what follows where memory is
            short.
        rebuild: Train again what was trained.

    Raises:
        ArtifactError: The pretrained encoder, the snapshot or the adapted encoder is missing or
            not whole, or the latter was adapted from another encoder.
        ContractError: A sample of the impressions has nothing to learn from.
        HardwareError: A training needs more memory than there is; none was begun.
    """
    stored = load_snapshot(store, snapshot)
    adapted = adapted_encoder(store, snapshot, base_model)
    starts: dict[Start, Path] = {"pretrained": base_model, "adapted": adapted.path}

    def compare(draft: Draft) -> None:
        require_training(
            stored, base_model=base_model, config=config, planning=planning or PlanningConfig()
        )
        data = Snapshot(
            items=stored.items,
            train=stored.splits.train,
            validation=stored.splits.validation,
            test=stored.splits.test,
        )
        samples = {share: nested_sample(data.train, share, config.seed) for share in study.shares}
        predictions: list[Predictions] = []
        seconds: dict[str, JsonValue] = {}
        for share, sample in samples.items():
            train = _repeated(sample, min(study.most_repeats, round(1 / share)))
            for start, encoder in starts.items():
                name = scorer_name(start, share)
                logger.info("training %s on %d impressions", name, sample.height)
                made, seconds[name] = _train_and_predict(
                    name, data, train, encoder, config, cache_directory
                )
                made.save(draft.path / name)
                predictions.append(made)
        judging = EvaluationConfig(bootstrap_samples=study.bootstrap_samples, seed=config.seed)
        rows = judge_label_efficiency(
            predictions, {share: sample.height for share, sample in samples.items()}, data, judging
        )
        draft.facts |= {
            "confidence": judging.confidence,
            "seconds": seconds,
            "rows": cast("JsonValue", [asdict(row) for row in rows]),
        }

    artifact = store.build(
        LABEL_EFFICIENCY_STUDY,
        snapshot,
        compare,
        code_version=code_version,
        parents={**stored.artifacts, ADAPTED_ENCODER: adapted},
        config=cast(
            "dict[str, JsonValue]",
            {
                **asdict(config),
                "study": asdict(study),
                "base_model_sha256": weights_hash(base_model),
            },
        ),
        rebuild=rebuild,
    )
    for row in label_shares(artifact):
        gains = {f"gain_{row.share:g}.{name}": row.difference[name].value for name in METRICS}
        tracker.log_metrics(gains, step=0)
    return artifact


def label_shares(study: Artifact) -> tuple[LabelShare, ...]:
    """What a study found, smallest share first."""
    rows = cast("list[Mapping[str, Any]]", study.facts["rows"])
    return tuple(LabelShare.from_dict(row) for row in rows)


def label_efficiency_table(study: Artifact) -> str:
    """The comparison as a Markdown table, smallest share first."""
    heads = ["labels", "impressions", "AUC, pretrained", "AUC, adapted", "difference"]
    heads += ["nDCG@10, pretrained", "nDCG@10, adapted", "difference"]
    lines = [heads, ["---:"] * len(heads)]
    for row in label_shares(study):
        line = [f"{row.share * 100:g} %", f"{row.impressions:,}"]
        for name in METRICS:
            line += [
                _interval(row.pretrained[name]),
                _interval(row.adapted[name]),
                _interval(row.difference[name], signed=True),
            ]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _train_and_predict(
    name: str,
    data: Snapshot,
    train: pl.DataFrame,
    encoder: Path,
    config: TrainingConfig,
    cache_directory: Path | None,
) -> tuple[Predictions, float]:
    """Train a ranker that is not kept; its predictions, and the seconds training took."""
    with tempfile.TemporaryDirectory(prefix="recflow-labels-") as folder:
        report = train_ranker(
            items=data.items,
            train=train,
            validation=data.validation,
            base_model=encoder,
            output=Path(folder),
            config=config,
            tracker=NullTracker(),
            cache_directory=cache_directory,
        )
        scorer = load_ranker(Path(folder), threads=config.threads).scorer(name, data.items)
        made = predict(scorer, data, catalogue_sample=0, seed=config.seed)
    return made, report.seconds


def _repeated(impressions: pl.DataFrame, times: int) -> pl.DataFrame:
    """Every impression several times, in order of time; each draws its own non-clicks."""
    return pl.concat([impressions] * times).sort(Columns.TIME, maintain_order=True)


def _interval(estimate: Estimate, *, signed: bool = False) -> str:
    shape = "+.4f" if signed else ".4f"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, shape)
    return f"{estimate.value:{shape}} [{estimate.low:{shape}}, {estimate.high:{shape}}]"
