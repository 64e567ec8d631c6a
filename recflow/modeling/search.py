"""Automatic optimisation: trials of training, judged on validation, within a budget of minutes.

Trials are drawn by a tree-structured Parzen estimator (Bergstra et al. 2011) and ended early when
their best epoch so far is worse than the median of the finished trials at the same epoch. The
first trial is the base configuration, so what is found is never worse than it on validation.

The study is a SQLite file that knows what it was made from and how much time it has taken. A
search that was killed goes on in it: the trial that was running is tried again, and every trial's
draw depends on the trials before it and on nothing else, so the trials are those of a search that
was not killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import polars as pl

from recflow.core.artifacts import JsonValue, sha256_of
from recflow.core.errors import ArtifactError, ConfigError, PermanentError, TransientError
from recflow.core.seeding import derive_seed
from recflow.modeling.config import TrainingConfig, with_values
from recflow.modeling.objectives import greater_is_better
from recflow.modeling.reports import EpochReport
from recflow.modeling.search_space import (
    Choices,
    SearchConfig,
    Value,
    check_space,
    space_as_json,
    value_at,
    whole_numbers,
)
from recflow.modeling.tracking import NullTracker, Tracker
from recflow.modeling.trainer import train_ranker

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger("recflow.training")

_STUDY_NAME = "search"
_TRIALS_BEFORE_PRUNING = 5
_FEWEST_TRIALS_FOR_IMPORTANCES = 15
# User attributes of the study and of its trials.
_MADE_FROM, _SECONDS = "made_from", "seconds"
_BASE, _NOTE = "base", "note"


@dataclass(frozen=True, slots=True)
class TrialReport:
    """One training of the search.

    Attributes:
        number: Order in which trials were made, from 0; the base configuration is 0.
        values: What differed from the base configuration, by dotted key.
        state: ``complete``; ``pruned``: ended early because it was behind; ``failed``: training
            could not be done with these values.
        metric: The primary metric of its best epoch on validation; ``None`` without an epoch.
        epochs: Epochs it trained.
        seconds: Wall time.
        note: Why it failed.
    """

    number: int
    values: dict[str, Value]
    state: Literal["complete", "pruned", "failed"]
    metric: float | None
    epochs: int
    seconds: float
    note: str


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What a search found and what it took.

    Attributes:
        primary_metric: What validation judged by.
        best: Values of the best trial by dotted key; the rest is the base configuration's.
        best_trial: Its number.
        best_metric: Its metric.
        base_metric: Metric of the base configuration.
        trials: Every trial, in order.
        importances: Share of each key in what the metric differed by (PED-ANOVA, Watanabe et al.
            2023), largest first; empty after fewer than 15 complete trials.
        seconds: Wall time of the whole search, over all processes that worked on it.
    """

    primary_metric: str
    best: dict[str, Value]
    best_trial: int
    best_metric: float
    base_metric: float
    trials: tuple[TrialReport, ...]
    importances: dict[str, float]
    seconds: float


def search_configuration(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    base_config: TrainingConfig,
    config: SearchConfig,
    study_path: Path,
    cache_directory: Path | None,
    tracker: Tracker,
) -> SearchReport:
    """Look for values of the training configuration that do better on validation.

    Args:
        items: Item features.
        train: Training impressions.
        validation: Validation impressions; they judge the trials.
        base_model: Hugging Face directory of the pretrained encoder.
        base_config: The first trial, and what the others differ from.
        config: Budget and space.
        study_path: SQLite file of the study; one that exists is gone on with.
        cache_directory: Hidden states shared by the trials; ``None`` keeps none.
        tracker: Told the space, and the metric of every trial.

    Raises:
        ArtifactError: ``study_path`` is another kind of file.
        ConfigError: The space has an unknown key or an impossible value, or the study at
            ``study_path`` was made from something else.
        PermanentError: The base configuration cannot be trained.
        TransientError: Another process works on the study.
    """
    check_space(config.space, base_config)
    made_from = {
        "items": _table_hash(items),
        "training impressions": _table_hash(train),
        "validation impressions": _table_hash(validation),
        "pretrained encoder": _model_hash(base_model),
        "base configuration": _hash(asdict(base_config)),
        "space": _hash(space_as_json(config.space)),
        "seed": _hash(config.seed),
    }
    tracker.log_params({"minutes": config.minutes, "space": space_as_json(config.space)})

    def train_trial(values: TrainingConfig, on_epoch: Callable[[EpochReport], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="recflow-trial-") as output:
            train_ranker(
                items=items,
                train=train,
                validation=validation,
                base_model=base_model,
                output=Path(output),
                config=values,
                tracker=NullTracker(),
                cache_directory=cache_directory,
                on_epoch=on_epoch,
            )

    with _open_study(study_path, base_config.schedule.primary_metric, made_from) as study:
        search = _Search(study, base_config, config, train_trial, tracker)
        search.run()
        return search.report()


class _TimeUpError(Exception):
    """The budget is spent; the running trial ends with its epoch."""


class _Clock:
    """Wall time spent on a study, kept in the study itself."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._before = float(study.user_attrs.get(_SECONDS, 0.0))
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def save(self) -> None:
        self._study.set_user_attr(_SECONDS, self.seconds)


class _Search:
    """A study, and how its trials are trained."""

    def __init__(
        self,
        study: optuna.Study,
        base: TrainingConfig,
        config: SearchConfig,
        train_trial: Callable[[TrainingConfig, Callable[[EpochReport], None]], None],
        tracker: Tracker,
    ) -> None:
        self._study, self._base, self._config = study, base, config
        self._train_trial, self._tracker = train_trial, tracker
        self._clock = _Clock(study)
        self._greater_is_better = greater_is_better(base.schedule.primary_metric)

    def run(self) -> None:
        """Make trials until time or trials are spent; the base configuration in any case."""
        self._retry_interrupted()
        if not self._study.trials:
            self._study.enqueue_trial(self._base_values(), user_attrs={_BASE: True})
        while not (done := self._finished()) or (
            len(done) < self._config.max_trials and self._seconds_left > 0
        ):
            self._make_trial(len(done))

    def report(self) -> SearchReport:
        """What was found so far."""
        trials = tuple(self._trial_report(n, trial) for n, trial in enumerate(self._finished()))
        # Of equals the first, so that the base configuration is only left for something better.
        best = min(
            (trial for trial in trials if trial.state == "complete"),
            key=lambda trial: (self._as_loss(trial.metric), trial.number),
        )
        assert best.metric is not None
        assert trials[0].metric is not None
        return SearchReport(
            primary_metric=self._base.schedule.primary_metric,
            best=best.values,
            best_trial=best.number,
            best_metric=best.metric,
            base_metric=trials[0].metric,
            trials=trials,
            importances=self._importances(trials),
            seconds=self._clock.seconds,
        )

    @property
    def _seconds_left(self) -> float:
        return self._config.minutes * 60 - self._clock.seconds

    def _finished(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that came to an end of their own: failures without a note were cut short."""
        from optuna.trial import TrialState

        return [
            trial
            for trial in self._study.trials
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            or (trial.state == TrialState.FAIL and _NOTE in trial.user_attrs)
        ]

    def _retry_interrupted(self) -> None:
        """Queue again what ran when the last process died."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._put_back(trial)

    def _put_back(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> None:
        from optuna.trial import TrialState

        is_base = bool(trial.user_attrs.get(_BASE))
        self._study.tell(trial.number, state=TrialState.FAIL)
        self._study.enqueue_trial({**trial.params}, user_attrs={_BASE: is_base})

    def _base_values(self) -> dict[str, Value]:
        """The base configuration as a point of the space; nothing where it lies outside."""
        values = {key: value_at(self._base, key) for key in self._config.space}
        inside = all(values[key] in dimension for key, dimension in self._config.space.items())
        return values if inside else {}

    def _make_trial(self, number: int) -> None:
        import optuna

        # A sampler of its own for each trial: a study that goes on after a kill draws the same.
        seed = derive_seed(self._config.seed, "trial", number) % 2**32
        # Keys are drawn together, as they act together: the learning rate with the strategy. That
        # needs keys that all trials share, which a base outside the space does not have.
        together = bool(self._base_values())
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=together)
        trial = self._study.ask()
        is_base = bool(trial.user_attrs.get(_BASE))
        values = self._values(trial, is_base)
        epochs: list[float] = []
        try:
            self._train_trial(with_values(self._base, values), self._judge(trial, epochs, is_base))
            self._study.tell(trial, self._best_of(epochs))
        except optuna.TrialPruned:
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except _TimeUpError:
            self._put_back(trial)
        except PermanentError as error:
            if is_base:
                raise
            trial.set_user_attr(_NOTE, str(error))
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        finally:
            self._clock.save()
        self._announce(number)

    def _values(self, trial: optuna.Trial, is_base: bool) -> dict[str, Value]:
        """Draw the values of a trial; those of the base configuration were queued with it."""
        if is_base and not self._base_values():
            return {}
        return {key: self._draw(trial, key) for key in sorted(self._config.space)}

    def _draw(self, trial: optuna.Trial, key: str) -> Value:
        dimension = self._config.space[key]
        if isinstance(dimension, Choices):
            return cast("Value", trial.suggest_categorical(key, list(dimension.choices)))
        low, high, log = dimension.low, dimension.high, dimension.log
        if whole_numbers(self._base, key, dimension):
            return trial.suggest_int(key, int(low), int(high), log=log)
        return trial.suggest_float(key, low, high, log=log)

    def _judge(
        self, trial: optuna.Trial, epochs: list[float], is_base: bool
    ) -> Callable[[EpochReport], None]:
        import optuna

        def on_epoch(epoch: EpochReport) -> None:
            epochs.append(epoch.validation)
            # The best so far, as training keeps its best epoch.
            trial.report(self._best_of(epochs), step=len(epochs))
            self._clock.save()
            if is_base:
                return
            if trial.should_prune():
                raise optuna.TrialPruned
            if self._seconds_left <= 0:
                raise _TimeUpError

        return on_epoch

    def _best_of(self, metrics: list[float]) -> float:
        return max(metrics) if self._greater_is_better else min(metrics)

    def _as_loss(self, metric: float | None) -> float:
        assert metric is not None
        return -metric if self._greater_is_better else metric

    def _trial_report(self, number: int, trial: optuna.trial.FrozenTrial) -> TrialReport:
        from optuna.trial import TrialState

        states: dict[TrialState, Literal["complete", "pruned", "failed"]] = {
            TrialState.COMPLETE: "complete",
            TrialState.PRUNED: "pruned",
            TrialState.FAIL: "failed",
        }
        epochs = list(trial.intermediate_values.values())
        return TrialReport(
            number=number,
            values=dict(sorted(trial.params.items())),
            state=states[trial.state],
            metric=self._best_of(epochs) if epochs else None,
            epochs=len(epochs),
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            note=trial.user_attrs.get(_NOTE, ""),
        )

    def _announce(self, number: int) -> None:
        """One line in the log, one point at the tracker."""
        finished = self._finished()
        if len(finished) == number:
            return
        trial = self._trial_report(number, finished[-1])
        metric = "no metric" if trial.metric is None else f"{trial.metric:.4f}"
        values = ", ".join(f"{key}={_shown(value)}" for key, value in trial.values.items())
        logger.info(
            "trial %d %s: %s %s after %d epochs, %.0f s, %.1f min left; %s",
            number,
            trial.state,
            self._base.schedule.primary_metric,
            metric,
            trial.epochs,
            trial.seconds,
            max(self._seconds_left, 0.0) / 60,
            trial.note or values or "the base configuration",
        )
        if trial.metric is not None:
            metrics = {"trial_metric": trial.metric, "best_metric": self._study.best_value}
            self._tracker.log_metrics(metrics, step=number)

    def _importances(self, trials: tuple[TrialReport, ...]) -> dict[str, float]:
        import optuna

        complete = [trial for trial in trials if trial.state == "complete" and trial.values]
        distinct = {trial.metric for trial in complete}
        if len(complete) < _FEWEST_TRIALS_FOR_IMPORTANCES or len(distinct) == 1:
            return {}
        found = optuna.importance.get_param_importances(self._study)
        return {key: float(share) for key, share in found.items()}


@contextlib.contextmanager
def _open_study(
    path: Path, primary_metric: str, made_from: Mapping[str, str]
) -> Generator[optuna.Study]:
    """Open or create the study, for this process alone.

    Raises:
        ArtifactError: The file is no study.
        ConfigError: The study was made from something else.
        TransientError: Another process has it open.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_user(path):
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
            raise ArtifactError(f"{path} is not the file of a study; move it away") from error
        try:
            study = optuna.create_study(
                storage=storage,
                study_name=_STUDY_NAME,
                direction="maximize" if greater_is_better(primary_metric) else "minimize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_PRUNING),
                load_if_exists=True,
            )
            _require_same_origin(path, study, made_from)
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()


@contextlib.contextmanager
def _only_user(path: Path) -> Generator[None]:
    """Hold the study's lock, which the system takes back from a process that dies."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransientError(
                f"another process works on the study {path}; wait for its end"
            ) from None
        yield


def _require_same_origin(path: Path, study: optuna.Study, made_from: Mapping[str, str]) -> None:
    known = study.user_attrs.get(_MADE_FROM)
    if known is None:
        study.set_user_attr(_MADE_FROM, {**made_from})
    elif known != made_from:
        other = [name for name, digest in made_from.items() if known.get(name) != digest]
        raise ConfigError(
            f"the study {path} was made with another {', another '.join(other)}; its trials cannot "
            "be compared with new ones: choose another file or delete this one"
        )


def _table_hash(frame: pl.DataFrame) -> str:
    rows = frame.hash_rows(seed=0).to_numpy()
    return hashlib.sha256(repr(frame.schema).encode() + rows.tobytes()).hexdigest()


def _model_hash(directory: Path) -> str:
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")])
    return _hash({file.name: sha256_of(file) for file in files})


def _hash(value: JsonValue | dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shown(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
