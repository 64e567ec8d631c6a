"""What steps take, predicted and measured: ``python -m recflow_tests.benchmarks.step_plan``.

Runs every step that makes a smaller model, and everything else that works with models, on a stored
snapshot (``make demo DATA=movielens`` stores one), each in a process of its own, and prints its
peak memory and time beside what :func:`recflow.hardware.steps.plan_step` said before it was run.
What the steps make goes to a temporary folder; the store is only read.

``--marks`` also prints the resident and the peak memory around the functions of a step.
``--results FILE`` keeps what was measured; steps found there are not run again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from recflow.core.artifacts import write_text_atomically
from recflow.hardware.plan import Measured, TrainingPlan, gib
from recflow.hardware.shape import EncoderShape
from recflow.hardware.steps import child_shape, plan_step
from recflow_tests.benchmarks.processes import in_own_process

_MEBIBYTE: Final = 1 << 20
_STATUS: Final = Path("/proc/self/status")
_FORGET_PEAK: Final = ("/proc/self/clear_refs", "5")  # proc(5): resets VmHWM
# What is not a table of the family: key of plan_step, and the steps that go with it.
OTHERS: Final = ("item_vectors", "predictions", "measurements", "compressed", "adapt")
CATALOGUE_SAMPLE: Final = 1_000  # what the asset of the predictions has by default
# Functions whose memory is looked at with --marks, where a step's module has them.
_WATCHED: Final = (
    "load_encoder",
    "load_parts",
    "items_in_use",
    "encode_all",
    "validation_auc",
    "recover",
    "save_ranker",
    "_auc",
    "_prepare",
    "_hidden_targets",
    "_learn_from_texts",
    "_learn_from_clicks",
    "measure_importance",
    "choose_kept",
    "pruned_copy",
    "lower_ranks",
    "measure_moments",
    "_moments",
    "measure_sensitivity",
    "check_padding",
    "export_encoder",
    "check_parity",
    "quantize_graph",
    "OnnxRuntime",
    "_cosines",
    "_write_tokenizer",
    "check_same_tokens",
    "trim_encoder",
    "TextTokenizer",
    "TrimmableTokenizer",
    "predict",
    "load_ranker",
    "frozen_item_vectors",
    "item_vectors_report",
    "_time_batches",
    "time_in_turns",
    "_probe",
    "adapt_encoder",
)


@dataclass(frozen=True, slots=True)
class Result:
    """One step, run in a process of its own.

    Attributes:
        name: Name of the model or asset.
        kind: Kind of step.
        peak_bytes: Peak resident memory of the process.
        seconds: Wall time of the step, imports and loading of tables left out.
        processor_seconds: Processor time of the same.
        marks: Name, resident MiB, peak MiB since the mark before, seconds, of each mark.
    """

    name: str
    kind: str
    peak_bytes: int
    seconds: float
    processor_seconds: float
    marks: list[tuple[str, float, float, float]]


class _Marks:
    """Memory of this process at named places."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.peak = 0.0
        self.found: list[tuple[str, float, float, float]] = []

    def add(self, name: str) -> None:
        """Note resident memory, and the peak since the mark before."""
        resident, peak = _status("VmRSS"), _status("VmHWM")
        self.peak = max(self.peak, peak)
        seconds = time.perf_counter() - self._started
        self.found.append((name, resident / _MEBIBYTE, peak / _MEBIBYTE, seconds))
        Path(_FORGET_PEAK[0]).write_text(_FORGET_PEAK[1], encoding="ascii")

    def watch(self, module: Any, name: str) -> None:
        """Mark before and after every call of a module's function."""
        function = getattr(module, name)

        def called(*arguments: Any, **named: Any) -> Any:
            self.add(f"before {name}")
            result = function(*arguments, **named)
            self.add(f"after {name}")
            return result

        setattr(module, name, called)


def _status(key: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def run_step(job: Mapping[str, Any]) -> Result:
    """Run one step in this process; what it makes is thrown away.

    Args:
        job: ``data``, name of a data source; ``name`` of the table of the family, or one of
            :data:`OTHERS`; ``marks``, whether to look at functions.
    """
    marks = _Marks()
    with tempfile.TemporaryDirectory() as folder:
        work, kind, modules = _work(job["data"], job["name"], Path(folder))
        marks.add("tables")
        if job["marks"]:
            for module in modules:
                for name in _WATCHED:
                    if callable(getattr(module, name, None)):
                        marks.watch(module, name)
        started, processor = time.perf_counter(), time.process_time()
        work()
        seconds, used = time.perf_counter() - started, time.process_time() - processor
        marks.add("end")
    return Result(job["name"], kind, round(marks.peak), seconds, used, marks.found)


def _work(data: str, name: str, folder: Path) -> tuple[Callable[[], object], str, list[Any]]:
    """What is to be run, its kind, and the modules whose functions are looked at."""
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.snapshots import load_snapshot
    from recflow.compression.family import load_family, with_deployment
    from recflow.demo import find_deployment
    from recflow.modeling.tracking import NullTracker

    settings = find_deployment(data).settings
    store, day = ArtifactStore(settings.store_dir), str(settings.last_day)
    family = load_family()
    if name in OTHERS:
        copy = _linked(settings.store_dir, folder, name)
        return _other(name, copy, day, settings, family)
    variant = family.variants[name]
    function = variant.step.function()
    snapshot = load_snapshot(store, day)
    tables: dict[str, Any] = {
        "items": snapshot.items,
        "train": snapshot.splits.train,
        "validation": snapshot.splits.validation,
    }
    config = with_deployment(variant.config, seed=settings.seed, threads=settings.threads)
    parent = store.get(family.key(variant.parent), day).path

    def work() -> object:
        return function(
            parent=parent, output=folder, config=config, tracker=NullTracker(), **tables
        )

    module = importlib.import_module(variant.step.place.split(":")[0])
    return work, variant.step.name, [module]


def _linked(source: Path, folder: Path, name: str) -> Path:
    """A store that links to what is stored, but for what is to be made."""
    made = {"adapt": "adapted_encoder"}.get(name, name)
    for group in source.iterdir():
        if not group.is_dir() or group.name.startswith("."):
            continue
        (folder / group.name).mkdir()
        for each in group.iterdir():
            if each.name not in (made, "searched"):
                (folder / group.name / each.name).symlink_to(each)
    return folder


def _other(
    name: str, place: Path, day: str, settings: Any, family: Any
) -> tuple[Callable[[], object], str, list[Any]]:
    from recflow.adapters import adaptation, budget_search, evaluations, item_vectors
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.compression import measure as measuring
    from recflow.compression.budget import Budget, ChainSpace
    from recflow.compression.config import VectorStoreConfig
    from recflow.compression.measure import MeasurementConfig
    from recflow.modeling.adaptation_config import AdaptationConfig
    from recflow.modeling.tracking import NullTracker

    common: dict[str, Any] = {"code_version": "benchmark", "rebuild": True}
    store, threads = ArtifactStore(place), settings.threads
    calls: dict[str, Callable[[], object]] = {
        "item_vectors": lambda: item_vectors.build_vector_stores(
            store,
            day,
            family=family,
            stores=[VectorStoreConfig(codec, threads=threads) for codec in ("int8", "pq")],
            **common,
        ),
        "predictions": lambda: evaluations.build_predictions(
            store,
            day,
            family=family,
            base_model=Path(settings.base_model),
            config=evaluations.ScoringConfig(CATALOGUE_SAMPLE, 0, threads),
            **common,
        ),
        "measurements": lambda: evaluations.build_measurements(
            store, day, family=family, texts=512, config=MeasurementConfig(), **common
        ),
        "compressed": lambda: budget_search.build_compressed(
            store,
            day,
            budget=Budget(max_megabytes=20.0),
            space=ChainSpace(),
            config=budget_search.BudgetSearchConfig(threads=threads),
            tracker=NullTracker(),
            **common,
        ),
        "adapt": lambda: adaptation.build_adapted_encoder(
            store,
            day,
            base_model=Path(settings.base_model),
            config=AdaptationConfig(threads=threads),
            tracker=NullTracker(),
            **common,
        ),
    }
    return calls[name], name, [evaluations, item_vectors, adaptation, measuring]


def planned(data: str, names: Sequence[str]) -> dict[str, TrainingPlan]:
    """What every step takes, by its name, before it is run on this machine."""
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.planning import PlanningConfig, machine_of, training_workload
    from recflow.adapters.snapshots import load_snapshot
    from recflow.compression.config import VectorStoreConfig
    from recflow.compression.family import ROOT, load_family, with_deployment
    from recflow.compression.measure import MeasurementConfig
    from recflow.demo import find_deployment
    from recflow.modeling.adaptation_config import AdaptationConfig
    from recflow.modeling.config import TrainingConfig
    from recflow.modeling.layout import read_ranker_config
    from recflow.modeling.texts import TOKENIZER_NAME

    settings, family = find_deployment(data).settings, load_family()
    store, day = ArtifactStore(settings.store_dir), str(settings.last_day)
    snapshot = load_snapshot(store, day)
    training = TrainingConfig(threads=settings.threads)
    root = store.get(family.key(ROOT), day).path
    workload = training_workload(
        items=snapshot.items,
        train=snapshot.splits.train,
        validation=snapshot.splits.validation,
        tokenizer=root / TOKENIZER_NAME,
        config=training,
    )
    machine = machine_of(training, PlanningConfig())
    models = {"models": len(family.names)}
    configs: dict[str, dict[str, Any]] = {
        "adapt": asdict(AdaptationConfig()),
        "compressed": {},
        "item_vectors": asdict(VectorStoreConfig()),
        "measurements": asdict(MeasurementConfig()) | models,
        "predictions": {"catalogue_sample": CATALOGUE_SAMPLE} | models,
    }
    plans: dict[str, TrainingPlan] = {}
    for name in names:
        place, kind = root, name
        if name in family.variants:
            variant = family.variants[name]
            kind = variant.step.name
            place = store.get(family.key(variant.parent), day).path
            configs[name] = asdict(
                with_deployment(variant.config, seed=settings.seed, threads=settings.threads)
            )
        parent = EncoderShape.from_config(read_ranker_config(place)["encoder"]["transformer"])
        child = child_shape(kind, parent, configs[name], workload)
        plans[name] = plan_step(
            kind, parent, child, configs[name], workload, machine.device, machine.calibration
        )
    return plans


def compare(results: Sequence[Result], plans: Mapping[str, TrainingPlan]) -> list[Measured]:
    """Peak memory and seconds of each result beside its plan, which counts no start."""
    found: list[Measured] = []
    for result in results:
        plan = plans[result.name]
        start = plan.stage("start")
        seconds = plan.seconds - (start.seconds if start else 0.0)
        found += [
            Measured(f"{result.name} memory", "bytes", plan.memory.total, result.peak_bytes),
            Measured(f"{result.name} time", "seconds", seconds, result.seconds),
        ]
    return found


def _table(compared: Sequence[Measured]) -> str:
    lines = ["| step | predicted | measured | error |", "|---|---:|---:|---:|"]
    for row in compared:
        amount = gib if row.unit == "bytes" else "{:.0f} s".format
        lines.append(
            f"| {row.name} | {amount(row.predicted)} | {amount(row.measured)} | {row.error:+.0%} |"
        )
    for unit in ("bytes", "seconds"):
        errors = [abs(row.error) for row in compared if row.unit == unit]
        middle, worst = statistics.median(errors), max(errors)
        lines.append(f"\nErrors in {unit}: median {middle:.0%}, worst {worst:.0%}.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, or, with ``--step``, one step of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["movielens"], help="data sources")
    parser.add_argument("--only", nargs="+", help="names of models or assets")
    parser.add_argument("--results", type=Path, help="file that keeps what was measured")
    parser.add_argument("--marks", action="store_true", help="memory around functions")
    parser.add_argument("--step", metavar="JOB", help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(asdict(run_step(json.loads(options.step)))))
        return
    from recflow.compression.family import load_family

    names = options.only or [*load_family().variants, *OTHERS]
    kept: dict[str, Any] = {}
    if options.results and options.results.is_file():
        kept = json.loads(options.results.read_text(encoding="utf-8"))
    for data in options.data:
        results: list[Result] = []
        for name in names:
            place = f"{data}/{name}"
            if place not in kept:
                job = {"data": data, "name": name, "marks": options.marks}
                kept[place] = in_own_process(__spec__.name, "--step", job)
                if options.results:
                    write_text_atomically(options.results, json.dumps(kept, indent=2) + "\n")
            results.append(Result(**kept[place]))
            if options.marks:
                for mark in results[-1].marks:
                    print("  {:40} {:7.0f} MiB, peak {:7.0f} MiB, {:6.1f} s".format(*mark))
        print(f"\n{data}\n\n{_table(compare(results, planned(data, names)))}\n", flush=True)


if __name__ == "__main__":
    main()
