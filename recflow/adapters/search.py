"""The found configuration as an artifact: a search on a stored snapshot, resumed after a kill."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import CONFIGURATION, ITEMS, TRAIN, VALIDATION
from recflow.adapters.models import weights_hash
from recflow.adapters.planning import PlanningConfig, require_training
from recflow.adapters.snapshots import load_snapshot
from recflow.core.artifacts import Artifact, Draft, JsonValue, fingerprint_of
from recflow.modeling.config import TrainingConfig
from recflow.modeling.search import SearchReport, search_configuration
from recflow.modeling.search_space import SearchConfig, Value, check_space, space_as_json
from recflow.modeling.tracking import Tracker

CONFIGURATION_NAME = "configuration.json"
TRIALS_NAME = "trials.json"


def build_configuration(
    store: ArtifactStore,
    snapshot: str,
    *,
    base_model: Path,
    base_config: TrainingConfig,
    config: SearchConfig,
    studies: Path,
    cache_directory: Path,
    tracker: Tracker,
    code_version: str,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Search the training configuration on a snapshot and store what was found.

    Writes ``configuration.json``, the values that differ from the base configuration by dotted key,
    and ``trials.json``, what every trial did. A search that is asked for again with more minutes or
    trials goes on with its study instead of beginning anew; ``rebuild`` begins anew.

    Args:
        store: Where the snapshot is read and the configuration is written.
        snapshot: Partition of the snapshot.
        base_model: Hugging Face directory of the pretrained encoder.
        base_config: What the search starts from and changes.
        config: Budget and space.
        studies: Folder of the studies' files.
        cache_directory: Hidden states shared by the trials and later trainings.
        tracker: Told the space and every trial's metric.
        code_version: Version of the searching code.
        planning: What a training from the base configuration is planned with, and what follows
            where memory is short; trials that take more are not planned.
        rebuild: Search again what was searched.

    Raises:
        ArtifactError: The pretrained encoder or the snapshot is missing or not whole.
        ConfigError: The space has an unknown key or an impossible value.
        HardwareError: A training needs more memory than there is; no trial was begun.
    """
    check_space(config.space, base_config)
    data = load_snapshot(store, snapshot)
    parents = {key: data.artifacts[key] for key in (TRAIN, VALIDATION, ITEMS)}
    searched: dict[str, JsonValue] = {
        "base_config": cast("JsonValue", asdict(base_config)),
        "base_model_sha256": weights_hash(base_model),
        "seed": config.seed,
        "space": space_as_json(config.space),
    }
    digests = {key: artifact.digest for key, artifact in parents.items()}
    study = fingerprint_of(CONFIGURATION, snapshot, code_version, digests, searched)
    study_path = studies / f"{snapshot}-{study[:16]}.db"

    def search(draft: Draft) -> None:
        require_training(
            data, base_model=base_model, config=base_config, planning=planning or PlanningConfig()
        )
        if rebuild:
            study_path.unlink(missing_ok=True)
        report = search_configuration(
            items=data.items,
            train=data.splits.train,
            validation=data.splits.validation,
            base_model=base_model,
            base_config=base_config,
            config=config,
            study_path=study_path,
            cache_directory=cache_directory,
            tracker=tracker,
        )
        _write(draft, report)

    return store.build(
        CONFIGURATION,
        snapshot,
        search,
        code_version=code_version,
        parents=parents,
        config={**searched, "minutes": config.minutes, "max_trials": config.max_trials},
        rebuild=rebuild,
    )


def found_values(configuration: Artifact) -> dict[str, Value]:
    """Values of a found configuration that differ from its base, by dotted key."""
    text = configuration.file(CONFIGURATION_NAME).read_text(encoding="utf-8")
    return json.loads(text)["values"]


def trials_table(configuration: Artifact) -> str:
    """The trials of a search as a Markdown table, with the importance of each key if known."""
    trials = json.loads(configuration.file(TRIALS_NAME).read_text(encoding="utf-8"))
    facts = configuration.facts
    seconds = cast("list[float]", facts["trial_seconds"])
    keys = sorted({key for trial in trials for key in trial["values"]})
    rows = [["trial", "state", str(facts["primary_metric"]), "s", *keys], ["---"] * (4 + len(keys))]
    for number, trial in enumerate(trials):
        state = "**best**" if number == facts["best_trial"] else trial["state"]
        values = [_cell(trial["values"].get(key)) for key in keys]
        rows.append([str(number), state, _cell(trial["metric"]), f"{seconds[number]:.0f}", *values])
    shares = cast("dict[str, float]", facts["importances"])
    if shares:
        rows.append(["", "importance", "", "", *(f"{shares.get(key, 0):.0%}" for key in keys)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _write(draft: Draft, report: SearchReport) -> None:
    """Timings go into the facts: the same search gives the same files on a slower machine."""
    trials = [asdict(trial) for trial in report.trials]
    draft.facts |= {
        "values": cast("JsonValue", report.best),
        "primary_metric": report.primary_metric,
        "best_metric": report.best_metric,
        "base_metric": report.base_metric,
        "best_trial": report.best_trial,
        "trials": len(trials),
        "trials_pruned": sum(trial.state == "pruned" for trial in report.trials),
        "trials_failed": sum(trial.state == "failed" for trial in report.trials),
        "importances": cast("JsonValue", report.importances),
        "seconds": report.seconds,
        "trial_seconds": [trial.pop("seconds") for trial in trials],
    }
    for name, content in ((CONFIGURATION_NAME, {"values": report.best}), (TRIALS_NAME, trials)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (draft.path / name).write_text(text + "\n", encoding="utf-8")


def _cell(value: Value | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
