"""Predicted beside measured: ``python -m recflow_tests.benchmarks.planner``.

Trains real configurations – encoders of several families and sizes × strategies × batches – on a
stored snapshot (``make demo DATA=simulated`` stores one), each in a process of its own, and prints
peak memory and time a step beside what was planned before the process was started. Encoders other
than all-MiniLM-L6-v2 get the sizes of well-known models and random weights: memory and time do not
depend on what weights say.

``--results FILE`` keeps what was measured; configurations found there are not run again. With
``--only NAME`` (``--list`` prints the names) one configuration is added to the file at a time, and
``--stored`` prints the tables of what the file holds. The formulas were worked on with every second
configuration in view (:data:`SEEN`); errors of the others are summed up apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recflow.adapters.planning import PEAK_MEMORY, WHOLE, PlannedTraining, measured_beside
from recflow.core.artifacts import write_text_atomically
from recflow.hardware.calibration import Calibration, default_calibration, save_calibration
from recflow.hardware.plan import Measured
from recflow.hardware.planner import training_work
from recflow.hardware.probe import Timed, fit_seconds, timed_stages
from recflow.modeling.config import TrainingConfig, with_values
from recflow.modeling.reports import TrainingReport
from recflow.modeling.texts import TOKENIZER_NAME
from recflow_tests.benchmarks.estimators import Run, estimate_all
from recflow_tests.benchmarks.processes import in_own_process, others_share, train_here

if TYPE_CHECKING:
    from recflow.settings import Settings

_MEBIBYTE: Final = 1 << 20
_FAIREST: Final = ", what learns"  # reading of other tools in the short table
_REAL: Final = "all-MiniLM-L6-v2"
_NARROW: Final = frozenset({"MiniLM-L12", "ELECTRA-small", "Qwen3-like, 8 × 512"})
_BERT: Final[dict[str, object]] = {"model_type": "bert", "vocab_size": 30_522}

# Sizes of models whose weights need not be at hand.
ENCODERS: Final[dict[str, dict[str, object] | None]] = {
    "all-MiniLM-L6-v2": None,  # the real one
    "MiniLM-L12": _BERT
    | {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "ELECTRA-small": {
        "model_type": "electra",
        "vocab_size": 30_522,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "DistilBERT": {"model_type": "distilbert", "vocab_size": 30_522},
    "BERT-base": _BERT,
    "MPNet-base": {"model_type": "mpnet", "vocab_size": 30_527},
    "ModernBERT-base": {"model_type": "modernbert", "vocab_size": 30_592},
    "Qwen3-like, 8 × 512": {
        "model_type": "qwen3",
        "vocab_size": 30_592,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
    },
}

_COMMON: Final[dict[str, object]] = {
    "schedule.head_epochs": 1,
    "schedule.encoder_epochs": 1,
    "schedule.head_batch_size": 128,
    "schedule.max_impressions_per_epoch": 1_024,
    "schedule.max_validation_impressions": 500,
    "schedule.encoder_batch_size": 256,
    "user_model.history_length": 20,
}
_FULL: Final = {"tuning.strategy": "full"}
_LORA: Final = {"tuning.strategy": "lora"}


def _few(impressions: int, batch: int) -> dict[str, object]:
    """Shorter epochs for slow configurations, of at least six steps."""
    return {
        "schedule.max_impressions_per_epoch": impressions,
        "schedule.encoder_batch_size": batch,
    }


GRID: Final[tuple[tuple[str, str, dict[str, object]], ...]] = (
    ("all-MiniLM-L6-v2", "frozen", {"tuning.strategy": "frozen"}),
    ("all-MiniLM-L6-v2", "2 layers, 256 texts", {}),
    ("all-MiniLM-L6-v2", "2 layers, 64 texts", {"speed.max_texts_per_step": 64}),
    ("all-MiniLM-L6-v2", "2 layers, all texts", {"speed.max_texts_per_step": 0}),
    ("all-MiniLM-L6-v2", "2 layers, float32", {"speed.precision": "fp32"}),
    ("all-MiniLM-L6-v2", "2 layers, no cache", {"speed.cache_hidden_states": False}),
    ("all-MiniLM-L6-v2", "2 layers, padded", {"speed.dynamic_padding": False}),
    (
        "all-MiniLM-L6-v2",
        "2 layers, all texts, 4 parts",
        {"speed.max_texts_per_step": 0, "speed.micro_batches": 4},
    ),
    ("all-MiniLM-L6-v2", "4 layers, 256 texts", {"tuning.tuned_layers": 4}),
    ("all-MiniLM-L6-v2", "LoRA", _LORA),
    ("all-MiniLM-L6-v2", "AdaLoRA", {"tuning.strategy": "adalora"}),
    ("all-MiniLM-L6-v2", "adapters", {"tuning.strategy": "adapters"}),
    ("all-MiniLM-L6-v2", "full, 64 texts", _FULL | {"speed.max_texts_per_step": 64}),
    ("all-MiniLM-L6-v2", "full, 256 texts", _FULL),
    ("all-MiniLM-L6-v2", "full, 256 texts, float32", _FULL | {"speed.precision": "fp32"}),
    (
        "all-MiniLM-L6-v2",
        "full, 256 texts, checkpointing",
        _FULL | {"speed.gradient_checkpointing": True},
    ),
    ("MiniLM-L12", "2 layers, 256 texts", {}),
    ("MiniLM-L12", "LoRA on 6 layers", _LORA | {"tuning.tuned_layers": 6}),
    ("MiniLM-L12", "full, 128 texts", _FULL | {"speed.max_texts_per_step": 128}),
    ("ELECTRA-small", "4 layers, 256 texts", {"tuning.tuned_layers": 4}),
    ("ELECTRA-small", "full, 128 texts", _FULL | {"speed.max_texts_per_step": 128}),
    ("DistilBERT", "2 layers, 256 texts", {}),
    ("DistilBERT", "LoRA, 256 texts", _LORA),
    (
        "DistilBERT",
        "full, 64 texts",
        _FULL | {"speed.max_texts_per_step": 64} | _few(512, 64),
    ),
    ("BERT-base", "frozen", {"tuning.strategy": "frozen"}),
    ("BERT-base", "2 layers, 256 texts", {}),
    ("BERT-base", "LoRA on 4 layers, 128 texts",
     _LORA | {"tuning.tuned_layers": 4, "speed.max_texts_per_step": 128}),
    ("BERT-base", "full, 64 texts", _FULL | {"speed.max_texts_per_step": 64} | _few(384, 64)),
    ("MPNet-base", "2 layers, 256 texts", {}),
    ("ModernBERT-base", "2 layers, 256 texts", {}),
    ("ModernBERT-base", "LoRA on 4 layers, 128 texts",
     _LORA | {"tuning.tuned_layers": 4, "speed.max_texts_per_step": 128}),
    ("Qwen3-like, 8 × 512", "2 layers, 256 texts", {}),
    ("Qwen3-like, 8 × 512", "full, 64 texts", _FULL | {"speed.max_texts_per_step": 64}),
)  # fmt: skip


def key_of(encoder: str, name: str) -> str:
    """Name of a configuration on the command line and in the file of results."""
    return f"{encoder}, {name}"


# Those that were in view when the formulas of memory and time were worked on.
SEEN: Final = frozenset(key_of(encoder, name) for encoder, name, _ in GRID[::2])


def write_encoder(
    directory: Path, config: Mapping[str, object], tokenizer: Path, *, weights: bool = True
) -> None:
    """Write an encoder of these sizes with random weights, and the tokenizer.

    Args:
        directory: Where to.
        config: Sizes; those not named are the family's usual ones.
        tokenizer: File to copy.
        weights: Whether weights are written, which planning does not need.
    """
    import shutil

    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    values = {key: value for key, value in config.items() if key != "model_type"}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)
    ends = dict.fromkeys(("eos_token_id", "sep_token_id"), 0)
    made: Any = AutoConfig.for_model(str(config["model_type"]), **{**special, **ends, **values})
    (AutoModel.from_config(made) if weights else made).save_pretrained(directory)
    shutil.copyfile(tokenizer, directory / tokenizer.name)


@dataclass(frozen=True, slots=True)
class Compared:
    """One configuration, as planned and as measured.

    Attributes:
        encoder: Name of the encoder.
        name: The configuration in words.
        memory: Peak memory in bytes.
        steps: Seconds of a step, by phase.
        whole: Seconds of all that was done, loading of the process left out.
        context: Bytes that the process would hold without the training, as planned.
        busy: Share of the processors' time that others took while it was measured.
        others: What other tools say of the memory, by tool and reading; ``None`` where they cannot.
    """

    encoder: str
    name: str
    memory: Measured
    steps: dict[str, Measured]
    whole: Measured
    context: int
    busy: float
    others: dict[str, int | None]


@dataclass(frozen=True, slots=True)
class _Planned:
    """One configuration with its plan, and with what measuring it needs."""

    encoder: str
    name: str
    base: Path
    config: TrainingConfig
    plan: PlannedTraining
    job: dict[str, Any]


def _plans(
    settings: Settings,
    threads: int,
    calibration: Path | None,
    results: Mapping[str, Any],
    keys: Collection[str],
) -> Iterator[_Planned]:
    """Plan configurations; encoders get weights where there is no result yet."""
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.planning import PlanningConfig, plan_of_training
    from recflow.adapters.snapshots import load_snapshot

    snapshot = str(settings.last_day)
    data = load_snapshot(ArtifactStore(settings.store_dir), snapshot)
    real = Path(settings.base_model)
    with tempfile.TemporaryDirectory(prefix="recflow-planner-") as folder:
        for encoder, name, own in GRID:
            key = key_of(encoder, name)
            if key not in keys:
                continue
            sizes, base = ENCODERS[encoder], real
            if sizes is not None:
                kind = "planned" if key in results else "trained"
                base = Path(folder) / f"{encoder.replace(' ', '_')}-{kind}"
                if not base.exists():
                    tokenizer = real / TOKENIZER_NAME
                    write_encoder(base, sizes, tokenizer, weights=key not in results)
            values = {**_COMMON, **own}
            config = with_values(TrainingConfig(threads=threads), values)
            plan = plan_of_training(
                items=data.items,
                train=data.splits.train,
                validation=data.splits.validation,
                base_model=base,
                config=config,
                planning=PlanningConfig("go_on", calibration),
                other_table_bytes=int(data.splits.test.estimated_size()),
                in_new_process=True,
            )
            job = {
                "store": str(settings.store_dir),
                "snapshot": snapshot,
                "base_model": str(base),
                "threads": threads,
                "values": values,
            }
            yield _Planned(encoder, name, base, config, plan, job)


def compare(
    settings: Settings,
    threads: int,
    calibration: Path | None,
    results: dict[str, Any],
    keys: Collection[str],
) -> Iterator[Compared]:
    """Plan and measure configurations of the grid.

    Args:
        settings: The deployment whose newest snapshot is trained on.
        threads: Threads of the trainings.
        calibration: What ``recflow probe`` found on this machine.
        results: ``report`` by configuration, and ``others``, see :func:`others_share`; what is
            missing is measured and put there.
        keys: The configurations; see :func:`key_of`.
    """
    for planned in _plans(settings, threads, calibration, results, keys):
        key, plan = key_of(planned.encoder, planned.name), planned.plan.plan
        if key not in results:
            others = others_share()
            report = in_own_process(__spec__.name, "--measure", planned.job)
            results[key] = {"report": report, "others": others()}
        report = TrainingReport.from_dict(results[key]["report"])
        rows = {row.name: row for row in measured_beside(plan, report)}
        yield Compared(
            planned.encoder,
            planned.name,
            memory=rows[PEAK_MEMORY],
            steps={
                phase: rows[f"{phase} step"]
                for phase in ("head", "encoder")
                if f"{phase} step" in rows
            },
            whole=rows[WHOLE],
            context=plan.memory.parts["context"],
            busy=results[key]["others"],
            others=_others(planned.base, planned.config, planned.plan),
        )


def fitted(settings: Settings, threads: int, results: Mapping[str, Any]) -> Calibration:
    """This machine's factors with those of time fitted to the results of :data:`SEEN` alone."""
    timed: list[Timed] = []
    keys = [key for key in results if key in SEEN]
    for planned in _plans(settings, threads, None, results, keys):
        device, plan = planned.plan.machine.device, planned.plan
        works = training_work(
            plan.shape, planned.config, plan.workload, device, default_calibration(device)
        )
        half = planned.config.speed.precision != "fp32" and device.supports("bf16")
        report = results[key_of(planned.encoder, planned.name)]["report"]
        timed += timed_stages(report, works, plan.shape.width, half)
    if not timed:
        raise SystemExit("no configuration that times are fitted to was measured yet; see --seen")
    return fit_seconds(timed, device, default_calibration(device))


def _others(base: Path, config: TrainingConfig, planned: PlannedTraining) -> dict[str, int | None]:
    """What other tools say of a configuration in which the encoder learns."""
    if config.tuning.strategy == "frozen":
        return {}
    run = Run.planned(
        json.loads((base / "config.json").read_text(encoding="utf-8")),
        config,
        planned.plan,
        length=planned.workload.lengths.mean,
        history=planned.workload.history,
    )
    return {f"{said.tool}, {said.reading}": said.bytes for said in estimate_all(run)}


def table(rows: Iterable[Compared]) -> Iterator[str]:
    """Predicted beside measured, row by row, as Markdown."""
    yield (
        "| encoder | training | peak MiB | predicted | error | head step ms | predicted | error "
        "| encoder step ms | predicted | error |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        cells = [
            row.encoder,
            row.name,
            f"{row.memory.measured / _MEBIBYTE:,.0f}",
            f"{row.memory.predicted / _MEBIBYTE:,.0f}",
            f"{row.memory.error:+.0%}",
        ]
        for phase in ("head", "encoder"):
            step = row.steps.get(phase)
            cells += (
                ["–"] * 3
                if step is None
                else [
                    f"{step.measured * 1e3:,.0f}",
                    f"{step.predicted * 1e3:,.0f}",
                    f"{step.error:+.0%}",
                ]
            )
        yield f"| {' | '.join(cells)} |"


def summary(rows: Sequence[Compared]) -> Iterator[str]:
    """Median and worst errors, of configurations seen while formulas were made and of others."""
    yield "| error of | configurations | median | worst | not seen before | median | worst |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    new = [row for row in rows if key_of(row.encoder, row.name) not in SEEN]
    for name, error in _ERRORS.items():
        cells: list[str] = []
        for some in (rows, new):
            errors = [found for row in some if (found := error(row)) is not None]
            cells += [str(len(errors)), *(_spoken(errors) if errors else ("–", "–"))]
        yield f"| {name} | {' | '.join(cells)} |"


def _memory(row: Compared) -> float:
    return row.memory.error


def _own_memory(row: Compared) -> float:
    return (row.memory.predicted - row.context) / (row.memory.measured - row.context) - 1


def _step(phase: str) -> Callable[[Compared], float | None]:
    return lambda row: row.steps[phase].error if phase in row.steps else None


_ERRORS: Final[dict[str, Callable[[Compared], float | None]]] = {
    "peak memory": _memory,
    "peak memory less what the process holds anyway": _own_memory,
    "head step": _step("head"),
    "encoder step": _step("encoder"),
    "whole training": lambda row: row.whole.error,
}


def _spoken(errors: Sequence[float]) -> tuple[str, str]:
    """Median of the sizes of errors, and the worst."""
    middle = statistics.median(abs(error) for error in errors)
    return f"{middle:.0%}", f"{max(errors, key=abs):+.0%}"


def _kind(row: Compared) -> str:
    """The group of a configuration in the short table."""
    if row.encoder == _REAL:
        wide = "MiniLM-L6 (384)"
    else:
        wide = "others of 256–512" if row.encoder in _NARROW else "others of 768"
    what = row.name.split(",")[0]
    if what.startswith(("LoRA", "AdaLoRA", "adapters")):
        return f"{wide}, low rank or adapters"
    return f"{wide}, {'all layers' if what == 'full' else 'frozen or top layers'}"


def groups_table(rows: Sequence[Compared]) -> Iterator[str]:
    """Errors by group, of this planner and of other tools told what learns; see ``estimators``."""
    tools = {
        name.removesuffix(_FAIREST): name
        for row in rows
        for name in row.others
        if name.endswith(_FAIREST)
    }
    yield f"| trainings | | recflow: memory | step | {' | '.join(tools)} |"
    yield f"|---|---:|---:|---:|{'---:|' * len(tools)}"
    groups: dict[str, list[Compared]] = {}
    for row in rows:
        groups.setdefault(_kind(row), []).append(row)
    for name, some in (*groups.items(), ("all", list(rows))):
        steps = [row.steps["encoder"].error for row in some if "encoder" in row.steps]
        errors = [[row.memory.error for row in some], steps]
        for reading in tools.values():
            said = [(row, row.others.get(reading)) for row in some]
            errors.append(
                [
                    bytes_ / (row.memory.measured - row.context) - 1
                    for row, bytes_ in said
                    if bytes_ is not None
                ]
            )
        cells = [" / ".join(_spoken(each)) if each else "–" for each in errors]
        yield f"| {name} | {len(some)} | {' | '.join(cells)} |"


def others_table(rows: Sequence[Compared]) -> Iterator[str]:
    """Errors of other estimators on the same trainings, beside the planner's."""
    trained = [row for row in rows if row.others]
    yield "| estimator, asked for | says | median error | worst | less context: median | worst |"
    yield "|---|---:|---:|---:|---:|---:|"
    tools = dict.fromkeys(name for row in trained for name in row.others)
    for name in ("recflow", *tools):
        whole: list[float] = []
        model: list[float] = []
        for row in trained:
            said = row.memory.predicted if name == "recflow" else row.others[name]
            if said is None:
                continue
            own = said - row.context if name == "recflow" else said
            whole.append(said / row.memory.measured - 1)
            model.append(own / (row.memory.measured - row.context) - 1)
        if not whole:
            yield f"| {name} | 0 of {len(trained)} | – | – | – | – |"
            continue
        cells = [" | ".join(_spoken(errors)) for errors in (whole, model)]
        yield f"| {name} | {len(whole)} of {len(trained)} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the comparison as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="simulated", help="whose snapshot: see make demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibration", type=Path, help="file of recflow probe")
    parser.add_argument("--results", type=Path, help="where measurements are kept")
    parser.add_argument("--only", action="append", metavar="NAME", help="may be given repeatedly")
    parser.add_argument("--stored", action="store_true", help="only what the results hold")
    parser.add_argument("--seen", action="store_true", help="only what formulas were made with")
    parser.add_argument("--list", action="store_true", help="print the configurations' names")
    parser.add_argument("--fit", type=Path, help="file for factors of time, fitted to those seen")
    parser.add_argument("--measure", metavar="JOB", help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(train_here(json.loads(options.measure), checkpoints=True)))
        return
    keys = [key_of(encoder, name) for encoder, name, _ in GRID]
    if unknown := set(options.only or ()).difference(keys):
        parser.error(f"no such configuration: {', '.join(sorted(unknown))}; see --list")
    keys = [key for key in keys if key in (options.only or keys)]
    if options.seen:
        keys = [key for key in keys if key in SEEN]
    if options.list:
        print(*keys, sep="\n")
        return
    from recflow.demo import find_deployment

    settings = find_deployment(options.data).settings
    file: Path | None = options.results
    results = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    if options.fit:
        save_calibration(fitted(settings, options.threads, results), options.fit)
        return
    if options.stored:
        keys = [key for key in keys if key in results]
    rows: list[Compared] = []
    heading, rule, *_ = table([])
    print(heading, rule, sep="\n", flush=True)
    for row in compare(settings, options.threads, options.calibration, results, keys):
        rows.append(row)
        print(*list(table([row]))[2:], sep="\n", flush=True)
        if file:
            write_text_atomically(file, json.dumps(results))
    for lines in (summary(rows), groups_table(rows), others_table(rows)):
        print("", *lines, sep="\n")
    if rows:
        shares = [row.busy for row in rows]
        middle, most = statistics.median(shares), max(shares)
        print(f"\nOther programs took of the processors: median {middle:.1%}, at most {most:.1%}")


if __name__ == "__main__":
    main()
