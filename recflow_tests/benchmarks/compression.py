"""What else one could do with the fine-tuned encoder: ``make bench-compress DATA=movielens``.

The same weights in the runtimes a user would reach for, beside every ranker that ``make demo``
stored of them. All encode the same item texts of the snapshot, with their real lengths, on the same
number of threads, in balanced turns of one process; load time and memory come from a fresh process
each. Accuracy is measured on test and compared, pair by pair, with PyTorch in float32.

The textbook pads every text to 128 tokens. Every other contender is given recflow's tokenizer and
its batches of similar length, so that what differs is the runtime and the model.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, RecflowError
from recflow.core.seeding import make_rng
from recflow.modeling.texts import (
    TOKENIZER_NAME,
    EncoderRuntime,
    TextTokenizer,
    Vectors,
    encode_texts,
    pad_tokens,
)

TEXTBOOK, PYTORCH, PYTORCH_BF16 = "textbook", "torch", "torch_bf16"
ONNX, OPENVINO, OPENVINO_FP32, VARIANT = "onnx", "openvino", "openvino_fp32", "variant"

BASE = "PyTorch float32"
_PADDED_TO = 128
_FRESH_SECONDS = 600
_FRESH_TEXTS = 32
_COMPARED_TEXTS = 100
_SINGLES, _BATCHES = 51, 6  # calls a turn; the first is not timed
_MEGABYTE, _MEBIBYTE = 10**6, 2**20


@dataclass(frozen=True)
class Contender:
    """One way to run the encoder: its kind, its weights, and the ranker it belongs to."""

    name: str
    kind: str
    weights: Path
    ranker: Path


class TextbookRuntime:
    """A Hugging Face model with mean pooling, as model cards show it; padded to 128 tokens."""

    def __init__(self, module: Any, threads: int) -> None:
        self._module, self._threads, self.dimension = module, threads, module.dimension

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        import torch

        from recflow.modeling.encoder import torch_threads

        ids = torch.zeros((len(tokens), _PADDED_TO), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch_threads(self._threads), torch.inference_mode():
            return self._module(ids, mask).numpy()


class PlainOnnx:
    """An ONNX Runtime session with nothing but its number of threads set."""

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        self.dimension = int(self._session.get_outputs()[0].shape[-1])

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        ids, mask = pad_tokens(tokens)
        feed = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        return self._session.run(None, feed)[0]


class OpenVino:
    """The ONNX graph in OpenVINO; it computes in bfloat16 where it can unless told not to."""

    def __init__(self, file: Path, threads: int, *, float32: bool) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if float32:
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self._model = openvino.Core().compile_model(file, "CPU", options)
        self.dimension = int(self._model.output(0).partial_shape[1].get_length())

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        ids, mask = pad_tokens(tokens)
        feed = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        return self._model(feed)[0].copy()


def textbook_module(ranker: Path) -> Any:
    """Hugging Face model, mean of the tokens, unit length, with the weights of a ranker.

    Raises:
        ConfigError: The ranker's encoder is more than that.
    """
    import torch
    from torch import Tensor, nn

    from recflow.modeling.layout import read_ranker_config
    from recflow.modeling.ranker import load_encoder

    encoder = load_encoder(ranker, read_ranker_config(ranker))
    if encoder.pooling != "mean" or encoder.adapters or encoder.projection is not None:
        raise ConfigError("the textbook's model has mean pooling, no adapters and no projection")

    class Textbook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.dimension = encoder.transformer, encoder.dimension

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1)

    return Textbook().eval()


def write_foreign_graphs(ranker: Path, folder: Path) -> tuple[Path, Path]:
    """The textbook's ONNX graph, and what ONNX Runtime's dynamic quantization makes of it."""
    import logging
    import warnings

    import torch
    from onnxruntime.quantization import quantize_dynamic

    float32, int8 = folder / "float32.onnx", folder / "int8.onnx"
    ids = torch.ones((2, 7), dtype=torch.long)
    axes = {0: "texts", 1: "tokens"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            textbook_module(ranker),
            (ids, torch.ones_like(ids)),
            float32,
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "vectors": {0: "texts"}},
        )
    logging.getLogger().setLevel(logging.ERROR)  # it advises to optimise; the session does
    quantize_dynamic(float32, int8)
    return float32, int8


def open_runtime(contender: Contender, threads: int) -> EncoderRuntime:
    """Load what executes a contender; imports nothing that it does not need."""
    if contender.kind == ONNX:
        return PlainOnnx(contender.weights, threads)
    if contender.kind in (OPENVINO, OPENVINO_FP32):
        return OpenVino(contender.weights, threads, float32=contender.kind == OPENVINO_FP32)
    if contender.kind == TEXTBOOK:
        return TextbookRuntime(textbook_module(contender.ranker), threads)
    from recflow.modeling.encoder import TorchRuntime
    from recflow.modeling.layout import read_ranker_config
    from recflow.modeling.ranker import load_encoder

    encoder = load_encoder(contender.ranker, read_ranker_config(contender.ranker))
    return TorchRuntime(encoder, threads, mixed=contender.kind == PYTORCH_BF16)


def open_tokenizer(contender: Contender) -> TextTokenizer:
    """The tokenizer of a contender's ranker."""
    from recflow.modeling.layout import read_ranker_config

    most = int(read_ranker_config(contender.ranker)["max_tokens"])
    return TextTokenizer(contender.ranker / TOKENIZER_NAME, most)


def load(contender: Contender, threads: int) -> Any:
    """A contender as a ranker, with the user model it was trained with."""
    from recflow.modeling.layout import read_ranker_config
    from recflow.modeling.ranker import Ranker, load_parts, load_ranker

    if contender.kind == VARIANT:
        return load_ranker(contender.ranker, threads=threads)
    parts = load_parts(contender.ranker, read_ranker_config(contender.ranker))
    return Ranker(open_runtime(contender, threads), open_tokenizer(contender), parts)


def in_fresh_process(contender: Contender, threads: int, texts: Sequence[str]) -> dict[str, float]:
    """Load time, imports left out, and peak memory of a process that does nothing else."""
    job = [contender.name, contender.kind, str(contender.weights), str(contender.ranker)]
    command = [sys.executable, "-m", "recflow_tests.benchmarks.compression", "--fresh", *job]
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        input=json.dumps(list(texts)),
        capture_output=True,
        text=True,
        timeout=_FRESH_SECONDS,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(contender: Contender, threads: int, texts: Sequence[str]) -> dict[str, float]:
    """What :func:`in_fresh_process` asks of that process."""
    from recflow.compression import probe
    from recflow.modeling.memory import peak_rss_bytes

    if contender.kind == VARIANT:
        return probe.main(contender.ranker, threads, list(texts))
    if contender.kind in (TEXTBOOK, PYTORCH, PYTORCH_BF16):
        # transformers imports an architecture when it builds one: not part of loading
        from recflow.modeling.encoder import build_encoder
        from recflow.modeling.layout import read_ranker_config

        build_encoder(read_ranker_config(contender.ranker)["encoder"])
    elif contender.kind == ONNX:
        import onnxruntime  # noqa: F401
    else:
        import openvino  # noqa: F401
    started = time.perf_counter()
    runtime, tokenizer = open_runtime(contender, threads), open_tokenizer(contender)
    seconds = time.perf_counter() - started
    encode_texts(runtime, tokenizer, texts)
    return {"load_seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def find_contenders(ranker: Path, models: Path, day: str, folder: Path) -> list[Contender]:
    """The runtimes around the fine-tuned weights, and every ranker stored for the day."""
    from recflow.modeling.encoder import WEIGHTS_NAME
    from recflow.modeling.layout import CONFIG_NAME
    from recflow.modeling.onnx_runtime import ONNX_NAME

    float32, int8 = write_foreign_graphs(ranker, folder)
    weights = ranker / WEIGHTS_NAME
    contenders = [
        Contender("textbook: PyTorch float32, padded to 128", TEXTBOOK, weights, ranker),
        Contender(BASE, PYTORCH, weights, ranker),
        Contender("PyTorch bfloat16 (autocast)", PYTORCH_BF16, weights, ranker),
        Contender("ONNX Runtime float32", ONNX, float32, ranker),
        Contender("ONNX Runtime, its dynamic int8", ONNX, int8, ranker),
        Contender("OpenVINO float32", OPENVINO_FP32, float32, ranker),
        Contender("OpenVINO as it comes", OPENVINO, float32, ranker),
    ]
    for variant in sorted(models.glob(f"*/{day}")):
        own = [variant / name for name in (WEIGHTS_NAME, ONNX_NAME)]
        file = next((file for file in own if file.is_file()), None)
        if file is not None and (variant / CONFIG_NAME).is_file():
            contenders.append(Contender(f"`{variant.parent.name}`", VARIANT, file, variant))
    return contenders


def table(
    contenders: Sequence[Contender], snapshot: Any, options: argparse.Namespace
) -> Iterator[str]:
    """Measure everything; lines of a Markdown table."""
    from recflow.compression.timing import time_in_turns

    rng = make_rng(0, "bench-compress")
    texts = snapshot.items[Columns.TEXT].to_list()

    def draw(count: int) -> list[str]:
        return [texts[place] for place in rng.choice(len(texts), count)]

    rankers = {c.name: load(c, options.threads) for c in contenders}
    encoders = {name: ranker.encode for name, ranker in rankers.items()}
    turns = 2 * options.rounds
    single = time_in_turns(encoders, [[draw(1) for _ in range(_SINGLES)] for _ in range(turns)])
    batches = time_in_turns(encoders, [[draw(32) for _ in range(_BATCHES)] for _ in range(turns)])
    sample = draw(options.texts)
    bulk = time_in_turns(encoders, [[draw(8), sample]] * turns)
    rates = {name: len(sample) / float(np.median(t.seconds)) for name, t in bulk.items()}

    probes = sorted(set(texts))[:: max(1, len(set(texts)) // _COMPARED_TEXTS)]
    reference = rankers[BASE].encode(probes)
    # The textbook's vectors are those of PyTorch in float32, as their cosine shows, only later.
    padded = contenders[0].name
    judged = judge({name: r for name, r in rankers.items() if name != padded}, snapshot)
    judged[padded] = judged[BASE]
    yield (
        "| | MB | texts/s | × textbook | batch 1: p50 / p95 / p99 ms | batch 32: p50 / p95 / p99 "
        "| load s | peak RSS MiB | cosine | test AUC | against PyTorch float32 |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for contender in contenders:
        name = contender.name
        fresh = in_fresh_process(contender, options.threads, sample[:_FRESH_TEXTS])
        vectors = rankers[name].encode(probes)
        same_width = vectors.shape == reference.shape
        cosine = np.einsum("ij,ij->i", vectors, reference).mean() if same_width else np.nan
        yield (
            f"| {name} | {contender.weights.stat().st_size / _MEGABYTE:.1f} | {rates[name]:,.0f} "
            f"| {rates[name] / rates[contenders[0].name]:.1f} "
            f"| {_percentiles(single[name].seconds)} | {_percentiles(batches[name].seconds)} "
            f"| {fresh['load_seconds']:.2f} | {fresh['peak_rss_bytes'] / _MEBIBYTE:,.0f} "
            f"| {cosine:.4f} | {judged[name]} |"
        )


def judge(rankers: Mapping[str, Any], snapshot: Any) -> dict[str, str]:
    """Test AUC of each, and what it gains over PyTorch in float32 with its 95 % interval."""
    from recflow.evaluation.evaluator import EvaluationConfig, evaluate
    from recflow.evaluation.scoring import Snapshot, predict

    splits = snapshot.splits
    seen = Snapshot(snapshot.items, splits.train, splits.validation, splits.test)
    predictions = [
        predict(ranker.scorer(name, seen.items), seen, catalogue_sample=0, seed=0)
        for name, ranker in rankers.items()
    ]
    references = {one.board: BASE for one in predictions}
    evaluation = evaluate(predictions, seen, EvaluationConfig(references=references))
    cells = {}
    for name in rankers:
        result = evaluation[name]
        cells[name] = f"{result.metrics['auc'].value:.4f} | "
        if result.reference is not None:
            gain = result.reference.differences["auc"]
            cells[name] += f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    return cells


def describe_machine(threads: int) -> str:
    """The processor and the versions, in a line."""
    import onnxruntime
    import openvino
    import torch

    names = [platform.processor() or platform.machine()]
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
        found = [f for f in ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile") if f in flags]
        names = [f"{names[0]} ({', '.join(found)})"]
    return (
        f"{names[0]}, {threads} thread{'s' * (threads > 1)} each; torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__.split('-')[0]}"
    )


def _percentiles(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1_000 * s:.2f}" for s in np.percentile(seconds, [50, 95, 99]))


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="movielens", help="whose snapshot: see make demo")
    parser.add_argument("--threads", type=int, default=1, help="of every contender")
    parser.add_argument("--rounds", type=int, default=3, help="of two turns each")
    parser.add_argument("--texts", type=int, default=256, help="encoded at a time for the rate")
    parser.add_argument("--fresh", nargs=4, metavar=("NAME", "KIND", "WEIGHTS", "RANKER"))
    options = parser.parse_args(arguments)
    if options.fresh:
        name, kind, weights, ranker = options.fresh
        contender = Contender(name, kind, Path(weights), Path(ranker))
        print(json.dumps(measure_here(contender, options.threads, json.load(sys.stdin))))
        return
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.keys import FINE_TUNED
    from recflow.adapters.snapshots import load_snapshot
    from recflow.demo import find_deployment

    settings = find_deployment(options.data).settings
    day, store = str(settings.last_day), ArtifactStore(settings.store_dir)
    snapshot, ranker = load_snapshot(store, day), store.get(FINE_TUNED, day).path
    print(f"{options.data}, snapshot {day}; {describe_machine(options.threads)}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        contenders = find_contenders(ranker, ranker.parent.parent, day, Path(folder))
        for line in table(contenders, snapshot, options):
            print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except RecflowError as error:
        sys.exit(f"recflow: {error}")
