"""What serving takes, predicted beside measured: ``make bench-serving-plan DATA=movielens``.

Two sets of models: every one that ``make demo`` stored, and encoders of other sizes with random
weights – what weights say changes neither memory nor time – in every precision that recflow serves.

Peak memory is that of a fresh process each, which loads the model and encodes 256 texts. Seconds of
one text, of eight, and of 256 in batches are taken in balanced turns of one process, the models of
one size beside each other. All encode texts of the snapshot's catalogue on one thread. Where other
things run on the machine, ``--clock processor`` counts the seconds that the thread was running.

``--fit`` fits the times' factors (:mod:`recflow.hardware.serving_factors`) to every second size and
every second stored model, prints them as code, and judges them on all others, which they have not
seen. ``--results FILE`` keeps what was measured; models found there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from scipy.optimize import nnls

from recflow.core.errors import RecflowError
from recflow.core.seeding import make_rng
from recflow.hardware.device import Device
from recflow.hardware.inference import ONNXRUNTIME, PRECISIONS, TORCH, ServedModel, plan_inference
from recflow.hardware.plan import InferencePlan, Measured
from recflow.hardware.serving_factors import ServingFactors, Speed, default_factors
from recflow.hardware.workload import InferenceWorkload, TextLengths

STORED: Final = "stored"
MEMORY, RATE, LATENCY = "peak memory", "texts a second", "one text"
_TEXTS, _BATCH, _FEW = 256, 64, 8
_MEBIBYTE: Final = 1 << 20
_PRODUCT: Final = "a matrix product"  # how fast the machine was meanwhile
_PRODUCT_SIZE: Final = 512

SIZES: Final[Mapping[str, tuple[int, int, int, int, int]]] = MappingProxyType(
    {  # layers, width, heads, channels, vocabulary
        "2 × 128": (2, 128, 2, 512, 30_522),
        "4 × 256": (4, 256, 4, 1024, 30_522),
        "6 × 384": (6, 384, 12, 1536, 30_522),
        "6 × 384, pruned": (6, 384, 6, 800, 30_522),
        "12 × 384": (12, 384, 12, 1536, 30_522),
        "4 × 512": (4, 512, 8, 2048, 60_000),
        "6 × 768": (6, 768, 12, 3072, 30_522),
        "12 × 768": (12, 768, 12, 3072, 30_522),
    }
)
"""Small and large, shallow and deep: random encoders of BERT's family."""


@dataclass(frozen=True)
class Contender:
    """One model in one runtime.

    Attributes:
        size: A key of :data:`SIZES`, or :data:`STORED`.
        name: Its name among those of its size.
        path: Folder of the model.
        model: What it is.
        bf16: Whether PyTorch may multiply bfloat16.
    """

    size: str
    name: str
    path: Path
    model: ServedModel
    bf16: bool = True

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.size}: {self.name}"

    @property
    def speed(self) -> str:
        """Which factors of speed it is planned with."""
        if self.model.runtime == TORCH and not self.bf16:
            return f"{TORCH}/fp32"
        precision = "autocast" if self.model.runtime == TORCH else self.model.precision
        if self.model.runtime == TORCH and self.model.precision == "bf16":
            precision = "bf16"
        return f"{self.model.runtime}/{'fp32' if precision == 'fp16' else precision}"


@dataclass(frozen=True)
class Seen:
    """What was measured of one model.

    Attributes:
        peak_bytes: Peak memory of a fresh process; 0 where it was not measured.
        seconds: Median seconds of one call, by how many texts it was given.
    """

    peak_bytes: float
    seconds: Mapping[int, float]


def stored_models(data: str) -> list[Contender]:
    """The family that ``make demo`` stored."""
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.keys import COMPRESSED
    from recflow.adapters.served import served_models
    from recflow.compression.family import load_family
    from recflow.core.artifacts import Artifact
    from recflow.core.errors import ArtifactError
    from recflow.demo import find_deployment

    settings = find_deployment(data).settings
    day, store = str(settings.last_day), ArtifactStore(settings.store_dir)
    family = load_family(settings.family)
    keys = {name: family.key(name) for name in family.names}
    found: dict[str, Artifact] = {}
    for name, key in {**keys, "compressed": COMPRESSED}.items():
        try:
            found[name] = store.get(key, day)
        except ArtifactError:  # not materialised
            continue
    served = served_models(family, found)
    return [Contender(STORED, name, found[name].path, model) for name, model in served.items()]


def catalogue(data: str) -> tuple[list[str], Path, int]:
    """Texts of the snapshot, the tokenizer of its fine-tuned model, most tokens of a text."""
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.keys import FINE_TUNED
    from recflow.adapters.snapshots import load_snapshot
    from recflow.core.columns import Columns
    from recflow.demo import find_deployment
    from recflow.modeling.layout import read_ranker_config
    from recflow.modeling.texts import TOKENIZER_NAME

    settings = find_deployment(data).settings
    day, store = str(settings.last_day), ArtifactStore(settings.store_dir)
    root = store.get(FINE_TUNED, day).path
    texts = load_snapshot(store, day).items[Columns.TEXT].to_list()
    return texts, root / TOKENIZER_NAME, int(read_ranker_config(root)["max_tokens"])


def random_models(
    size: str, folder: Path, tokenizer: Path, tokens: list[list[int]], max_tokens: int
) -> list[Contender]:
    """Encoders of one size with random weights, in every precision of both runtimes."""
    import shutil

    import torch
    from transformers import BertConfig, BertModel

    from recflow.adapters.served import served_model
    from recflow.compression.config import QuantizationConfig
    from recflow.compression.export import export_encoder
    from recflow.compression.quantize import quantize_graph
    from recflow.modeling.encoder import TextEncoder, describe_encoder, save_encoder
    from recflow.modeling.layout import CONFIG_NAME, LAYOUT, ONNX_NAME, WEIGHTS_NAME

    layers, width, heads, channels, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=channels,
    )
    encoder = TextEncoder(BertModel(config, add_pooling_layer=False), "mean").eval()
    graph: Any = None
    found: list[Contender] = []
    for runtime, precisions in PRECISIONS.items():
        for precision in precisions:
            path = folder / f"{size} {runtime} {precision}".replace(" ", "-")
            described: dict[str, Any] = {"layout": LAYOUT, "runtime": runtime}
            described |= {"precision": precision, "max_tokens": max_tokens}
            if runtime == TORCH:
                described["encoder"] = describe_encoder(encoder)
            if not (path / CONFIG_NAME).is_file():
                path.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tokenizer, path / tokenizer.name)
                if runtime == TORCH:
                    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                    save_encoder(encoder, path / WEIGHTS_NAME, dtype)
                else:
                    graph = graph or export_encoder(encoder)
                    quantization = QuantizationConfig(precision=precision, calibration_texts=32)
                    content = quantize_graph(graph, tokens, quantization)
                    (path / ONNX_NAME).write_bytes(content)
                (path / CONFIG_NAME).write_text(json.dumps(described), encoding="utf-8")
            parent = found[0].model if found else None
            model = served_model(path, exported_from=parent)
            found.append(Contender(size, f"{runtime} {precision}", path, model))
            if runtime == TORCH and precision == "fp32":
                found.append(Contender(size, "torch fp32 alone", path, model, bf16=False))
    return found


def load(contender: Contender, threads: int) -> Callable[[list[str]], object]:
    """What encodes texts with a model."""
    from recflow.modeling.encoder import TorchRuntime, hold_in_bfloat16
    from recflow.modeling.layout import BF16, ONNX_NAME, read_ranker_config
    from recflow.modeling.onnx_runtime import OnnxRuntime
    from recflow.modeling.ranker import load_encoder
    from recflow.modeling.texts import TOKENIZER_NAME, EncoderRuntime, TextTokenizer, encode_texts

    path, config = contender.path, read_ranker_config(contender.path)
    if config["runtime"] == ONNXRUNTIME:
        runtime: EncoderRuntime = OnnxRuntime(path / ONNX_NAME, threads)
    else:
        encoder = load_encoder(path, config)
        if config.get("precision") == BF16:
            hold_in_bfloat16(encoder)
        runtime = TorchRuntime(encoder, threads, mixed=contender.bf16)
    tokenizer = TextTokenizer(path / TOKENIZER_NAME, int(config["max_tokens"]))
    return lambda texts: encode_texts(runtime, tokenizer, texts)


def measure(
    contenders: Sequence[Contender],
    texts: Sequence[str],
    clock: Callable[[], float],
    rounds: int,
    *,
    memory: bool = True,
) -> dict[str, Seen]:
    """Measure models beside each other."""
    import torch

    from recflow.compression.timing import time_in_turns

    rng = make_rng(0, "serving plan")
    sample = list(texts)[:_TEXTS]
    torch.set_num_threads(1)
    encoders = {each.key: load(each, 1) for each in contenders}
    square = torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE)
    encoders[_PRODUCT] = lambda _: [square @ square for _ in range(8)]

    def drawn(count: int) -> list[str]:
        return [sample[int(place)] for place in rng.choice(len(sample), count, replace=False)]

    seconds: dict[str, dict[int, float]] = {name: {} for name in encoders}
    for count, calls, turns in (
        (1, 15, 4 * rounds),
        (_FEW, 4, 4 * rounds),
        (_TEXTS, 1, 2 * rounds),
    ):
        batches = [
            [drawn(min(count, _BATCH)), *(drawn(count) for _ in range(calls))] for _ in range(turns)
        ]
        for name, taken in time_in_turns(encoders, batches, clock=clock).items():
            seconds[name][count] = statistics.median(taken.seconds)
    rate = 8 * 2 * _PRODUCT_SIZE**3 / seconds.pop(_PRODUCT)[_TEXTS] / 1e9
    print(f"  {contenders[0].size}: {rate:,.0f} GFLOP/s of float32 products meanwhile", flush=True)
    encoders.clear()
    return {
        each.key: Seen(peak_bytes(each, sample) if memory and each.bf16 else 0.0, seconds[each.key])
        for each in contenders
    }


def peak_bytes(contender: Contender, texts: Sequence[str]) -> float:
    """Peak memory of a fresh process that loads a model and encodes texts."""
    done = subprocess.run(
        [sys.executable, "-m", "recflow.compression.probe", str(contender.path), "1"],
        input=json.dumps(list(texts)),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"])


class Planner:
    """Plans a model in both ways that it was measured in."""

    def __init__(self, device: Device, lengths: TextLengths) -> None:
        """Plan for texts of these lengths on one thread of a device."""
        self.device, self.lengths = device, lengths

    def plan(
        self, contender: Contender, texts: int, factors: ServingFactors | None = None
    ) -> InferencePlan:
        """The plan of one model; ``texts`` are encoded together."""
        device = self.device
        if not contender.bf16:
            rates = {name: rate for name, rate in device.teraflops.items() if name != "bf16"}
            device = replace(device, teraflops=rates)
        lengths = self.lengths
        if 1 < texts < _BATCH:  # a single batch of texts that nobody sorted: as long as its longest
            lengths = TextLengths((lengths.drawn(texts)[-1],))
        workload = InferenceWorkload(
            items=0, history=0, candidates=0, texts=1, lengths=lengths, batch=min(texts, _BATCH)
        )
        return plan_inference(contender.model, workload, device, threads=1, factors=factors)

    def compared(
        self, contender: Contender, seen: Seen, factors: ServingFactors | None = None
    ) -> list[Measured]:
        """Predicted beside measured."""
        plan = self.plan(contender, _TEXTS, factors)
        rows = [
            Measured(RATE, "texts/s", plan.texts_per_second, _TEXTS / seen.seconds[_TEXTS]),
            Measured(LATENCY, "seconds", plan.latency_seconds, seen.seconds[1]),
        ]
        if seen.peak_bytes:
            rows.insert(0, Measured(MEMORY, "bytes", plan.memory.total, seen.peak_bytes))
        return rows

    def terms(self, contender: Contender, count: int) -> tuple[list[float], float]:
        """What the seconds of a call are made of: a weight of each unknown factor, and the rest.

        Found by planning with factors that leave only one of them: a plan is linear in them.
        """
        zero = Speed(1e18, 1e18, 1e18, layer_seconds=0.0, call_seconds=0.0)
        single = (
            zero,
            replace(zero, call_seconds=1.0),
            replace(zero, layer_seconds=1.0),
            replace(zero, matrix_share=1.0),
            replace(zero, bandwidth_share=1.0),
            replace(zero, activation_share=1.0),
        )
        rest, *values = (
            self.call_seconds(contender, count, _only(speed, self.device)) for speed in single
        )
        return [value - rest for value in values], rest

    def call_seconds(self, contender: Contender, count: int, factors: ServingFactors) -> float:
        """Seconds of a call with so many texts."""
        plan = self.plan(contender, count, factors)
        return plan.latency_seconds if count == 1 else count / plan.texts_per_second


def _only(speed: Speed, device: Device) -> ServingFactors:
    usual = default_factors(device)
    return replace(usual, speeds=MappingProxyType(dict.fromkeys(usual.speeds, speed)))


def fit(
    planner: Planner, contenders: Sequence[Contender], seen: Mapping[str, Seen]
) -> ServingFactors:
    """Factors of time that are nearest to what was measured, relative to it.

    Non-negative least squares for each runtime and precision; a call's seconds are linear in the
    seconds of a call, of a layer, and in the reciprocals of the shares.
    """
    usual = default_factors(planner.device)
    speeds = dict(usual.speeds)
    for name in usual.speeds:
        rows: list[list[float]] = []
        goals: list[float] = []
        for each in contenders:
            if each.speed != name:
                continue
            for count, seconds in seen[each.key].seconds.items():
                weights, rest = planner.terms(each, count)
                rows.append([weight / seconds for weight in weights])
                goals.append(1 - rest / seconds)
        if rows:
            call, layer, matrix, bandwidth, activations = nnls(np.array(rows), np.array(goals))[0]
            speeds[name] = Speed(
                matrix_share=_share(matrix),
                bandwidth_share=_share(bandwidth),
                activation_share=_share(activations),
                layer_seconds=float(layer),
                call_seconds=float(call),
            )
    return replace(usual, speeds=MappingProxyType(speeds))


def _share(reciprocal: float) -> float:
    return float(1 / reciprocal) if reciprocal > 1e-6 else 1e6


def every_second(contenders: Sequence[Contender]) -> list[Contender]:
    """Random encoders of every second size in all precisions, and every second stored model."""
    stored = [each for each in contenders if each.size == STORED]
    sizes = list(SIZES)[::2]
    return [each for each in contenders if each.size in sizes or each in stored[::2]]


def as_code(factors: ServingFactors) -> Iterator[str]:
    """The speeds as they are written in :mod:`recflow.hardware.serving_factors`."""
    for name, speed in factors.speeds.items():
        micro = f"{speed.layer_seconds * 1e6:.0f}e-6, {speed.call_seconds * 1e6:.0f}e-6"
        shares = (speed.matrix_share, speed.bandwidth_share, speed.activation_share)
        yield f'"{name}": Speed({", ".join(f"{share:.3g}" for share in shares)}, {micro}),'


def table(
    planner: Planner,
    contenders: Sequence[Contender],
    seen: Mapping[str, Seen],
    factors: ServingFactors | None = None,
) -> Iterator[str]:
    """Lines of a Markdown table, then the median and the worst error of each column."""
    yield (
        "| | memory MiB: predicted | measured | error | texts/s: predicted | measured | error "
        "| one text, ms: predicted | measured | error |"
    )
    yield "|---" + "|---:" * 9 + "|"
    errors: dict[str, list[float]] = {MEMORY: [], RATE: [], LATENCY: []}
    for each in contenders:
        rows = {row.name: row for row in planner.compared(each, seen[each.key], factors)}
        cells: list[str] = []
        for name, scale in ((MEMORY, 1 / _MEBIBYTE), (RATE, 1.0), (LATENCY, 1e3)):
            row = rows.get(name)
            if row is None:
                cells += ["", "", ""]
                continue
            errors[name].append(row.error)
            digits = 2 if name == LATENCY else 0
            shown = (row.predicted * scale, row.measured * scale)
            cells += [*(f"{value:,.{digits}f}" for value in shown), f"{row.error:+.0%}"]
        yield f"| {each.key} | {' | '.join(cells)} |"
    yield ""
    for name, found in errors.items():
        if found:
            absolute = [abs(error) for error in found]
            median, worst = statistics.median(absolute), max(absolute)
            yield (
                f"{name}: median error {median:.1%}, worst {worst:.1%}, "
                f"mean {statistics.mean(found):+.1%} ({len(found)} models)"
            )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and fit if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="movielens", help="whose snapshot: see make demo")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument(
        "--rounds", type=int, default=2, help="of two turns each, for large batches"
    )
    parser.add_argument("--times-only", action="store_true", help="measure no memory")
    parser.add_argument("--fit", action="store_true", help="fit the factors of time")
    parser.add_argument("--results", type=Path, help="keep measurements in this file")
    parser.add_argument("--models", type=Path, help="keep random models in this folder")
    parser.add_argument("--only", help="sizes to measure, separated by semicolons")
    options = parser.parse_args(arguments)

    from recflow.hardware.machine import this_machine
    from recflow.modeling.texts import TextTokenizer

    texts, tokenizer, max_tokens = catalogue(options.data)
    places = make_rng(0, "texts").choice(len(texts), min(_TEXTS, len(texts)), replace=False)
    texts = [texts[int(place)] for place in places]
    tokens = TextTokenizer(tokenizer, max_tokens)(texts)
    device = this_machine()
    planner = Planner(device, TextLengths.of([len(text) for text in tokens]))
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    print(f"{platform.processor() or platform.machine()}, planned as {device.label}, one thread")

    kept: dict[str, Seen] = {}
    if options.results and options.results.is_file():
        for key, value in json.loads(options.results.read_text(encoding="utf-8")).items():
            seconds = {int(count): taken for count, taken in value["seconds"].items()}
            kept[key] = Seen(value["peak_bytes"], seconds)
    wanted = options.only.split(";") if options.only else [STORED, *SIZES]
    everything: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        place = options.models or Path(folder)
        for size in wanted:
            if size == STORED:
                contenders = stored_models(options.data)
            else:
                contenders = random_models(
                    size, place, tokenizer, sorted(tokens, key=len), max_tokens
                )
            everything += contenders
            if not all(each.key in kept for each in contenders):
                kept |= measure(
                    contenders, texts, clock, options.rounds, memory=not options.times_only
                )
                if options.results:
                    content = {key: asdict(value) for key, value in kept.items()}
                    options.results.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if not options.fit:
        print(*table(planner, everything, kept), sep="\n")
        return
    learnt = every_second(everything)
    factors = fit(planner, learnt, kept)
    print("\nfitted to every second model", *as_code(factors), sep="\n")
    print("\nmodels that were fitted to\n", *table(planner, learnt, kept, factors), sep="\n")
    others = [each for each in everything if each not in learnt]
    print("\nmodels that were not\n", *table(planner, others, kept, factors), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except RecflowError as error:
        sys.exit(f"recflow: {error}")
