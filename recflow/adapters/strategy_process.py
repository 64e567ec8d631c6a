"""Train one strategy and score the snapshot with it, in a process of its own.

Started by :mod:`recflow.adapters.strategies` as ``python -m recflow.adapters.strategy_process``
with the job as JSON on standard input; answers with one line of JSON, or with the sentence of what
went wrong and exit status 2. Progress goes to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.snapshots import load_snapshot
from recflow.core.errors import RecflowError
from recflow.evaluation.scoring import Snapshot, predict
from recflow.modeling.config import TrainingConfig, config_from
from recflow.modeling.ranker import load_ranker
from recflow.modeling.reports import TrainingReport
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import train_ranker


def train_and_predict(job: Mapping[str, Any]) -> TrainingReport:
    """Do one job and write its predictions below ``output``, under the strategy's name.

    Args:
        job: ``store``, ``snapshot``, ``base_model``, ``config`` (nested) and ``output``.
    """
    config = config_from(TrainingConfig, job["config"])
    name = config.tuning.strategy
    stored = load_snapshot(ArtifactStore(Path(job["store"])), job["snapshot"])
    snapshot = Snapshot(
        items=stored.items,
        train=stored.splits.train,
        validation=stored.splits.validation,
        test=stored.splits.test,
    )
    with tempfile.TemporaryDirectory(prefix="recflow-strategy-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        report = train_ranker(
            items=stored.items,
            train=stored.splits.train,
            validation=stored.splits.validation,
            base_model=Path(job["base_model"]),
            output=model,
            config=config,
            tracker=NullTracker(),
        )
        scorer = load_ranker(model, threads=config.threads).scorer(name, stored.items)
        predictions = predict(scorer, snapshot, catalogue_sample=0, seed=config.seed)
        predictions.save(Path(job["output"]) / name)
    return report


def main() -> None:
    """Read the job, do it, answer."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("recflow").setLevel(logging.INFO)
    try:
        report = train_and_predict(json.load(sys.stdin))
    except RecflowError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(2)
    sys.stdout.write(json.dumps(asdict(report)) + "\n")


if __name__ == "__main__":
    main()
