"""Measures this machine and fits the factors of the planner: ``recflow probe``.

Three things are measured, with invented texts and random weights, so that nothing is needed beside
recflow itself:

* rates: matrix products in float32, bfloat16 and int8, copying memory, starting an operator;
* memory: what a process holds before it reads anything, and what the allocator holds for a byte
  that the backward pass keeps, by family, precision and strategy;
* real steps: short trainings of a few encoders, each in a process of its own.

The shares of the rates are then fitted to the seconds of the real steps, by least squares of the
relative errors. ``make bench-planner`` checks the result on other encoders and real texts.
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from recflow.core.errors import HardwareError
from recflow.hardware.calibration import COMPILING_SECONDS, Calibration, default_calibration
from recflow.hardware.device import Device
from recflow.hardware.planner import Work, plan_training, training_work
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import Popularity, TextLengths, TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values

_WORDS: Final = 2_000
_ITEMS: Final = 640
_IMPRESSIONS: Final = 1_280
_HISTORY: Final = 20
_SLATE: Final = 9
_REPEATS: Final = 5
_WIDEST_HALF: Final = 3_000  # half widths that are tried, and the distance between them
_HALF_STEP: Final = 20
_PRODUCTS: Final = 2  # columns of the fit that are seconds of products
_BERT: Final[dict[str, Any]] = {"model_type": "bert", "vocab_size": _WORDS}
_ENCODERS: Final[dict[str, dict[str, Any]]] = {
    "4 × 256": {**_BERT, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                "intermediate_size": 1024},
    "5 × 384": {**_BERT, "hidden_size": 384, "num_hidden_layers": 5, "num_attention_heads": 6,
                "intermediate_size": 1536},
    "3 × 768": {**_BERT, "hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 12,
                "intermediate_size": 3072},
    "modernbert": {"model_type": "modernbert", "vocab_size": _WORDS, "hidden_size": 384,
                   "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 576},
    "decoder": {"model_type": "qwen3", "vocab_size": _WORDS, "hidden_size": 384,
                "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
                "head_dim": 64, "intermediate_size": 1152, "max_position_embeddings": 512},
}  # fmt: skip
_TRAININGS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("4 × 256", {}),
    ("4 × 256", {"tuning.strategy": "full"}),
    ("5 × 384", {"tuning.tuned_layers": 3}),
    ("5 × 384", {"tuning.strategy": "lora", "tuning.tuned_layers": 3}),
    ("5 × 384", {"tuning.strategy": "full", "speed.precision": "fp32"}),
    ("3 × 768", {}),
    ("3 × 768", {"speed.precision": "fp32", "tuning.tuned_layers": 1}),
    ("modernbert", {}),
    ("decoder", {}),
)
_HEAPS: Final = (
    *(("bert", "5 × 384", strategy) for strategy in ("top_k_layers", "lora", "adapters")),
    ("modernbert", "modernbert", "top_k_layers"),
    ("modernbert", "modernbert", "lora"),
    ("decoder", "decoder", "top_k_layers"),
    ("decoder", "decoder", "lora"),
)
_KINDS: Final = {"top_k_layers": "plain", "lora": "low-rank", "adapters": "adapters"}
_COMMON: Final[dict[str, Any]] = {
    "schedule.head_epochs": 1,
    "schedule.encoder_epochs": 1,
    "schedule.max_impressions_per_epoch": _IMPRESSIONS,
    "schedule.max_validation_impressions": 300,
    "user_model.history_length": _HISTORY,
    "speed.max_texts_per_step": 192,
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What plain operations reach.

    Attributes:
        teraflops: Matrix products by precision, in 10^12 operations a second.
        bandwidth_gb_s: Bytes read and written when memory is copied, in 10^9 a second.
        operator_seconds: Seconds of an operator that has next to nothing to do.
    """

    teraflops: Mapping[str, float]
    bandwidth_gb_s: float
    operator_seconds: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """What :func:`probe` fits factors to.

    Attributes:
        rates: Of plain operations.
        heaps: What the allocator holds for a byte that is needed, as ``Calibration.heap``.
        runs: Trainings: what each reported, its encoder and its configuration.
    """

    rates: Rates
    heaps: Mapping[str, float]
    runs: tuple[tuple[Mapping[str, Any], str, Mapping[str, Any]], ...]


def probe(
    device: Device, threads: int, tell: Callable[[str], None] = lambda _: None
) -> Calibration:
    """Measure this machine; takes a few minutes, in which nothing else should run.

    Args:
        device: The class of this machine in the catalogue: the shares are shares of its rates.
        threads: Threads of the trainings.
        tell: Told what is measured.

    Raises:
        HardwareError: A process of the probe failed.
    """
    return fitted(measure(device, threads, tell), device, threads)


def measure(device: Device, threads: int, tell: Callable[[str], None]) -> Measurements:
    """Take all measurements of :func:`probe`, each training in a process of its own.

    Raises:
        HardwareError: A process of the probe failed.
    """
    rates = measure_rates(threads)
    tell(f"{_spoken(rates)}")
    heaps: dict[str, float] = {}
    runs: list[tuple[Mapping[str, Any], str, Mapping[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="recflow-probe-") as folder:
        place = Path(folder)
        for family, encoder, strategy in _HEAPS:
            for precision in ("bf16", "fp32") if device.supports("bf16") else ("fp32",):
                job = {"do": "heap", "encoder": encoder, "strategy": strategy}
                answer = _in_own_process({**job, "precision": precision, "threads": threads}, place)
                name = f"{family} {precision} {_KINDS[strategy]}"
                heaps[name] = max(1.0, answer["held"] / answer["saved"])
                tell(f"heap of {name}: {heaps[name]:.2f}")
        for encoder, values in _TRAININGS:
            job = {"do": "train", "encoder": encoder, "values": values, "threads": threads}
            answer = _in_own_process(job, place)
            runs.append((answer, encoder, values))
            tell(f"{encoder} {values or ''}: {answer['peak_rss_bytes'] / 2**20:,.0f} MiB")
    return Measurements(rates, heaps, tuple(runs))


def fitted(found: Measurements, device: Device, threads: int) -> Calibration:
    """Factors of a machine from what was measured on it; see :func:`probe`."""
    base = replace(default_calibration(device), heap=found.heaps)
    fast = _fit_seconds(found.runs, device, base, threads)
    return replace(
        _fit_context(found.runs, device, fast, threads),
        is_measured=True,
        source=f"recflow probe, {threads} threads, {len(found.runs)} trainings; "
        f"{_spoken(found.rates)}",
    )


def measure_rates(threads: int) -> Rates:
    """Rates of plain operations, the best of a few attempts."""
    import torch

    from recflow.modeling.encoder import torch_threads

    def best(function: Callable[[], object]) -> float:
        function()
        seconds: list[float] = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    size = 1_024
    with torch_threads(threads), torch.inference_mode():
        teraflops: dict[str, float] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            matrix = torch.randn(size, size).to(dtype)
            seconds = best(lambda matrix=matrix: matrix @ matrix)
            teraflops[name] = 2 * size**3 / seconds / 1e12
        whole = torch.randint(-128, 127, (size, size), dtype=torch.int8)
        int_mm = cast("Any", torch)._int_mm
        teraflops["int8"] = 2 * size**3 / best(lambda: int_mm(whole, whole)) / 1e12
        source = torch.randn(64 << 20)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
        one, times = torch.ones(1), 10_000
        operator = best(lambda: [one + 1 for _ in range(times)]) / times
    return Rates(teraflops, bandwidth, operator)


def _spoken(rates: Rates) -> str:
    products = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.teraflops.items())
    return (
        f"matrix products in 10^12 a second: {products}; copying {rates.bandwidth_gb_s:.0f} GB/s; "
        f"{rates.operator_seconds * 1e6:.1f} µs an operator"
    )


# ---------------------------------------------------------------------- fitting


def _plan_parts(
    encoder: str, values: Mapping[str, Any], threads: int
) -> tuple[EncoderShape, TrainingConfig, TrainingWorkload]:
    shape = EncoderShape.from_config({"max_position_embeddings": 512, **_ENCODERS[encoder]})
    config = with_values(TrainingConfig(threads=threads), {**_COMMON, **values})
    return shape, config, _workload(config)


@dataclass(frozen=True, slots=True)
class Timed:
    """A stage whose seconds were measured.

    Attributes:
        work: What it asked of the device.
        seconds: What it took.
        width: Of the encoder.
        half: Whether the encoder's matrices were multiplied in bfloat16.
    """

    work: Work
    seconds: float
    width: int
    half: bool


def fit_seconds(timed: Sequence[Timed], device: Device, calibration: Calibration) -> Calibration:
    """Shares of matrix rates and bandwidth, the width that halves them, and seconds an operator.

    For a given half width the seconds are linear in what is left, with a share of a matrix rate of
    at most 1: of a row of half widths the one that leaves the smallest relative error is taken.

    Args:
        timed: Stages of a few kinds and widths.
        device: Whose rates the shares are shares of.
        calibration: What keeps all other factors.
    """
    import numpy as np
    from scipy.optimize import lsq_linear  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    # Each row says: what the factors make of this stage is once the seconds it took, less those in
    # which products were compiled.
    table = np.array(
        [[each / one.seconds for each in _features(one.work, device, one.half)] for one in timed]
    )
    wanted = [max(0.0, 1 - one.work.kernels * COMPILING_SECONDS / one.seconds) for one in timed]
    widths = np.array([one.width for one in timed])
    least = [1.0] * _PRODUCTS + [0.0] * (table.shape[1] - _PRODUCTS)
    solve = cast("Any", lsq_linear)
    fits: list[tuple[float, float, list[float]]] = []
    for half_width in range(0, _WIDEST_HALF + 1, _HALF_STEP):
        slower = np.ones_like(table)
        slower[:, :_PRODUCTS] += (half_width / widths)[:, None]
        found = solve(table * slower, np.array(wanted), bounds=(least, np.inf), tol=1e-12)
        fits.append((float(found.cost), float(half_width), [float(each) for each in found.x]))
    _, half_width, inverse = min(fits)
    half_inverse, float_inverse, bytes_inverse, operator = inverse
    matrices = {"fp32": _share(float_inverse)}
    if device.supports("bf16"):
        matrices["bf16"] = _share(half_inverse)
    return replace(
        calibration,
        matrix_share=matrices,
        half_width=half_width,
        bandwidth_share=_share(bytes_inverse),
        operator_seconds=operator,
    )


def timed_stages(
    report: Mapping[str, Any], works: Mapping[str, Work], width: int, half: bool
) -> list[Timed]:
    """The stages of a training that were measured one by one; see :class:`Timed`."""
    return [
        Timed(works[name], seconds, width, half)
        for name, seconds in _seconds_of(report).items()
        if name in works and seconds > 0
    ]


def _fit_seconds(
    runs: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]],
    device: Device,
    calibration: Calibration,
    threads: int,
) -> Calibration:
    timed: list[Timed] = []
    for report, encoder, values in runs:
        shape, config, workload = _plan_parts(encoder, values, threads)
        works = training_work(shape, config, workload, device, calibration)
        half = config.speed.precision != "fp32" and device.supports("bf16")
        timed += timed_stages(report, works, shape.width, half)
    return fit_seconds(timed, device, calibration)


def _features(work: Work, device: Device, half: bool) -> list[float]:
    """Seconds at full rates: products in bfloat16, in float32, bytes; and operators."""
    rate = device.teraflops["bf16" if half else "fp32"] * 1e12
    encoder = work.flops / rate
    head = work.float_flops / (device.teraflops["fp32"] * 1e12)
    halves, floats = (encoder, head) if half else (0.0, encoder + head)
    return [halves, floats, work.bytes / (device.bandwidth_gb_s * 1e9), work.operators]


def _share(inverse: float) -> float:
    """A share from its inverse; what no stage needs counts as next to free."""
    return 1 / inverse if inverse > 1e-3 else 1e3


def _seconds_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of one step of each phase.

    Those of computing the hidden states are left out: what is set up once in a process and written
    to files counts as much there as the products do.
    """
    found: dict[str, float] = {}
    for epoch in report["epochs"]:
        stepping = epoch["seconds"] - epoch["validation_seconds"]
        found[epoch["phase"]] = stepping / epoch["steps"]
    return found


def _fit_context(
    runs: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]],
    device: Device,
    calibration: Calibration,
    threads: int,
) -> Calibration:
    """What processes hold beside what is planned: the median of what the peaks leave."""
    left: list[float] = []
    for report, encoder, values in runs:
        shape, config, workload = _plan_parts(encoder, values, threads)
        planned = plan_training(shape, config, workload, device, calibration).memory
        others = planned.total - planned.parts["context"]
        left.append(report["peak_rss_bytes"] - others)
    middle = sorted(left)[len(left) // 2]
    return replace(calibration, context_bytes=max(0, round(middle)))


# ---------------------------------------------------------------------- processes


def _in_own_process(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "recflow.hardware.probe", str(folder)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise HardwareError(f"the probe of this machine failed at {dict(job)}: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one job of the probe in this process."""
    base = folder / str(job["encoder"]).replace(" ", "_")
    if not base.exists():
        _write_encoder(base, _ENCODERS[job["encoder"]])
    if job["do"] == "heap":
        return _measure_heap(base, job)
    return _train(base, job)


def _measure_heap(base: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the allocator holds after a forward pass, and how much of it the graph keeps."""
    import torch

    from recflow.modeling.config import TuningConfig
    from recflow.modeling.encoder import load_pretrained, mixed_precision, torch_threads
    from recflow.modeling.tuning import apply_strategy

    encoder = load_pretrained(base).eval()
    layers = 3
    apply_strategy(TuningConfig(strategy=job["strategy"], tuned_layers=layers), encoder)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return {"saved": 1.0, "held": 1.0}  # only glibc is known to hold more than is in use
    saved, held = 0.0, 0.0
    last = len(encoder.layers)
    with torch_threads(job["threads"]):
        for turn in range(3):
            trim(0)
            before = _anonymous_bytes()
            vectors: list[torch.Tensor] = []
            with mixed_precision("cpu", job["precision"] == "bf16"):
                for length in (18, 24, 33):
                    hidden = torch.randn(64, length, encoder.width)
                    mask = torch.ones(64, length, dtype=torch.bool)
                    ran = encoder.run_layers(hidden, mask, last - layers, last)
                    vectors.append(encoder.pool(ran, mask))
            grown = _anonymous_bytes() - before
            trim(0)
            needed = _anonymous_bytes() - before
            total: Any = torch.cat(vectors).sum()
            total.backward()
            encoder.zero_grad()
            if turn:  # in the first turn kernels are compiled
                saved, held = saved + needed, held + grown
    return {"saved": saved, "held": held}


def _anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise HardwareError("this system does not tell the anonymous memory of a process")


def _train(base: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    from recflow.modeling.tracking import NullTracker
    from recflow.modeling.trainer import train_ranker

    items, train, validation = _tables()
    config = with_values(TrainingConfig(threads=job["threads"]), {**_COMMON, **job["values"]})
    with tempfile.TemporaryDirectory() as output:
        report = train_ranker(
            items=items,
            train=train,
            validation=validation,
            base_model=base,
            output=Path(output),
            config=config,
            tracker=NullTracker(),
        )
    return asdict(report)


def _write_encoder(directory: Path, config: Mapping[str, Any]) -> None:
    """Random weights of these sizes, and a tokenizer of invented words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel

    cast("Any", torch).manual_seed(0)
    values = {key: value for key, value in config.items() if key != "model_type"}
    special = ("pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")
    made: Any = cast("Any", AutoConfig).for_model(
        str(config["model_type"]), **{**dict.fromkeys(special, 0), **values}
    )
    cast("Any", AutoModel).from_config(made).save_pretrained(directory)
    words = {f"w{number}": number for number in range(_WORDS)}
    tokenizer: Any = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def _lengths() -> list[int]:
    """Lengths of the invented texts in tokens, special tokens included."""
    quantiles = TextLengths.typical(22.0, 60).quantiles
    return [quantiles[number % len(quantiles)] for number in range(_ITEMS)]


def _drawn() -> tuple[Any, Any]:
    """Item rows of histories and slates, ``[impressions, …]``; some items are more popular."""
    import numpy as np

    rng = np.random.default_rng(0)
    weights = (1.0 + np.arange(_ITEMS)) ** -0.7
    shape = (_IMPRESSIONS + 300, _HISTORY + _SLATE)
    rows = rng.choice(_ITEMS, size=shape, p=weights / weights.sum())
    return rows[:, :_HISTORY], rows[:, _HISTORY:]


def _tables() -> tuple[Any, Any, Any]:
    """Items and impressions as training reads them; each slate has one click."""
    from datetime import UTC, datetime, timedelta

    import numpy as np
    import polars as pl

    from recflow.core.columns import Columns

    rng = np.random.default_rng(1)
    texts = [
        " ".join(f"w{word}" for word in rng.integers(3, _WORDS, length - 2))
        for length in _lengths()
    ]
    items = pl.DataFrame(
        {
            Columns.ITEM_ID: [f"i{number}" for number in range(_ITEMS)],
            Columns.TEXT: texts,
            Columns.CATEGORY: [f"c{number % 10}" for number in range(_ITEMS)],
        }
    )
    histories, slates = _drawn()
    start = datetime(2024, 1, 1, tzinfo=UTC)
    impressions = pl.DataFrame(
        {
            Columns.IMPRESSION_ID: [str(number) for number in range(len(slates))],
            Columns.USER_ID: [f"u{number % 400}" for number in range(len(slates))],
            Columns.TIME: [start + timedelta(minutes=number) for number in range(len(slates))],
            Columns.HISTORY: [[f"i{row}" for row in rows] for rows in histories.tolist()],
            Columns.CANDIDATES: [[f"i{row}" for row in rows] for rows in slates.tolist()],
            Columns.LABELS: [[1] + [0] * (_SLATE - 1)] * len(slates),
        },
        schema_overrides={Columns.LABELS: pl.List(pl.Int8)},
    )
    return items, impressions[:_IMPRESSIONS], impressions[_IMPRESSIONS:]


def _workload(config: TrainingConfig) -> TrainingWorkload:
    """The invented tables as the planner sees them."""
    import numpy as np

    histories, slates = _drawn()
    counts = np.bincount(np.concatenate([histories.ravel(), slates.ravel()]), minlength=_ITEMS)
    return TrainingWorkload(
        impressions=_IMPRESSIONS,
        clicks=min(_IMPRESSIONS, config.schedule.max_impressions_per_epoch),
        validation_impressions=300,
        history=float(_HISTORY),
        slate=float(_SLATE),
        items=_ITEMS,
        lengths=TextLengths.of(_lengths()),
        popularity=Popularity.of([int(count) for count in counts]),
        table_bytes=math.ceil(slates.size + histories.size) * 24,
        categories=10,
    )


if __name__ == "__main__":
    answered = main(Path(sys.argv[1]), json.load(sys.stdin))
    sys.stdout.write(json.dumps(answered) + "\n")
