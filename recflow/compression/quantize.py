"""Export the encoder to ONNX, prove that it is the same model, and quantize it to 8-bit integers.

Weights are quantized per channel ahead of time, activations per call (dynamic quantization):
per-tensor weights lost several times more accuracy. The user model is small and stays in float32.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from torch.jit._trace import TracerWarning  # torch.jit does not export it

from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError, ParityError
from recflow.modeling.encoder import WEIGHTS_NAME, TextEncoder, TorchRuntime
from recflow.modeling.layout import ONNXRUNTIME, read_ranker_config
from recflow.modeling.onnx_runtime import INPUT_NAMES, ONNX_NAME, OUTPUT_NAME, OnnxRuntime
from recflow.modeling.ranker import (
    count_parameters,
    load_encoder,
    load_parts,
    save_parts,
)
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer, encode_texts

_OPSET = 17
_PARITY_BATCHES = (1, 3, 32)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How to quantize, and how much deviation to accept.

    Attributes:
        parity_tolerance: Largest difference of any vector element between the float32 export and
            PyTorch. Unit vectors have elements of about 0.05.
        min_cosine: Lowest mean cosine between int8 and float32 vectors of real texts.
        sample_texts: Item texts that parity and cosine are measured on, evenly spread by length.
        threads: Threads used while measuring.
    """

    parity_tolerance: float = 1e-4
    min_cosine: float = 0.95
    sample_texts: int = 256
    threads: int = 2

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        if not 0 < self.parity_tolerance < 1:
            raise ConfigError.of("parity_tolerance", self.parity_tolerance, "above 0, below 1")
        if not 0 < self.min_cosine <= 1:
            raise ConfigError.of("min_cosine", self.min_cosine, "above 0, at most 1")
        for key in ("sample_texts", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What quantization did.

    Attributes:
        parity_cases: Batches compared between PyTorch and the float32 export.
        parity_max_difference: Largest difference of a vector element over all of them.
        mean_cosine: Mean cosine between int8 and float32 vectors of real texts.
        min_cosine: Lowest of them.
        parent_bytes: Size of the parent's encoder weights.
        bytes: Size of the int8 encoder.
        seconds: Wall time.
    """

    parity_cases: int
    parity_max_difference: float
    mean_cosine: float
    min_cosine: float
    parent_bytes: int
    bytes: int
    seconds: float


def quantize_ranker(
    *, parent: Path, output: Path, items: pl.DataFrame, config: QuantizationConfig
) -> QuantizationReport:
    """Write the int8 version of a ranker, executed by ONNX Runtime.

    Args:
        parent: Directory of a PyTorch ranker.
        output: Existing empty directory.
        items: Item features; their texts are what parity and cosine are measured on.
        config: Limits.

    Raises:
        ArtifactError: The parent is not a complete PyTorch ranker, or ``items`` is empty.
        ParityError: The float32 export differs from PyTorch, or int8 from float32, by more than
            the limits. Nothing is written.
    """
    started = time.monotonic()
    described = read_ranker_config(parent)
    encoder = load_encoder(parent, described)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    texts = _sample(items, config.sample_texts)

    exported = export_encoder(encoder)
    float32 = OnnxRuntime(exported, config.threads)
    cases = _parity_cases(tokenizer(texts))
    difference = check_parity(encoder, float32, cases, config.parity_tolerance)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONNX_NAME
        _quantize(exported, file)
        int8 = OnnxRuntime(file, config.threads)
        cosines = np.einsum(
            "ij,ij->i",
            encode_texts(int8, tokenizer, texts),
            encode_texts(float32, tokenizer, texts),
        )
        if not cosines.mean() >= config.min_cosine:
            raise ParityError(
                f"int8 vectors have a mean cosine of {cosines.mean():.4f} to float32, allowed is "
                f"{config.min_cosine} or more; the encoder does not survive dynamic quantization"
            )
        shutil.copyfile(file, output / ONNX_NAME)
    save_parts(
        output,
        tokenizer.path,
        parts,
        runtime={"runtime": ONNXRUNTIME, "precision": "int8"},
        encoder_parameters=count_parameters(encoder),
    )
    return QuantizationReport(
        parity_cases=len(cases),
        parity_max_difference=difference,
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        parent_bytes=(parent / WEIGHTS_NAME).stat().st_size,
        bytes=(output / ONNX_NAME).stat().st_size,
        seconds=time.monotonic() - started,
    )


class _ExportedEncoder(nn.Module):
    """The encoder with the mask as integers, as ONNX callers pass it."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(ids, mask.bool())


def export_encoder(encoder: TextEncoder) -> bytes:
    """The encoder as a float32 ONNX graph: mask-aware mean pooling and unit length included.

    Inputs are int64 ``input_ids`` and ``attention_mask`` ``[texts, tokens]``, the output is
    ``vectors`` ``[texts, dimension]``; both sizes of the inputs are free.
    """
    # The exporter puts the module it was given back into *that module's* mode. Without eval() on
    # the wrapper, dropout would be on in the encoder afterwards.
    wrapper = _ExportedEncoder(encoder).eval()
    ids = torch.ones((2, 7), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = {0: "texts", 1: "tokens"}
    with _quiet_export(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONNX_NAME
        torch.onnx.export(
            wrapper,
            (ids, mask),
            file,
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(INPUT_NAMES),
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAMES[0]: axes, INPUT_NAMES[1]: axes, OUTPUT_NAME: {0: "texts"}},
        )
        return file.read_bytes()


def check_parity(
    encoder: TextEncoder,
    exported: OnnxRuntime,
    cases: list[list[list[int]]],
    tolerance: float,
) -> float:
    """Largest difference of a vector element between PyTorch (float32) and the export.

    Args:
        encoder: The model that was exported.
        exported: The export.
        cases: Batches of token ids.
        tolerance: Largest difference allowed.

    Raises:
        ParityError: Names the batch with a larger difference.
    """
    reference = TorchRuntime(encoder, None, mixed=False)
    worst = 0.0
    for case in cases:
        difference = float(np.abs(reference(case) - exported(case)).max())
        if not difference <= tolerance:
            lengths = sorted({len(text) for text in case})
            raise ParityError(
                f"the ONNX export differs from PyTorch by {difference:.2g} (allowed {tolerance}) "
                f"for {len(case)} texts of {lengths} tokens; it is not written"
            )
        worst = max(worst, difference)
    return worst


def _parity_cases(tokens: list[list[int]]) -> list[list[list[int]]]:
    """Batches of several sizes: of short, of long, and of mixed texts, so with much padding."""
    by_length = sorted(tokens, key=len)
    cases: list[list[list[int]]] = []
    for size in _PARITY_BATCHES:
        mixed = by_length[:: max(1, len(by_length) // size)][:size]
        cases += [by_length[:size], by_length[-size:], mixed]
    return [*cases, [by_length[0], by_length[-1]]]


def _sample(items: pl.DataFrame, limit: int) -> list[str]:
    """At most ``limit`` item texts, evenly spread from the shortest to the longest."""
    texts = items[Columns.TEXT].unique().sort()
    if texts.is_empty():
        raise ArtifactError("there are no item texts to compare the quantized encoder on")
    texts = texts.gather(texts.str.len_chars().arg_sort())
    places = np.linspace(0, len(texts) - 1, min(limit, len(texts))).round().astype(np.int64)
    return texts.gather(places).to_list()


def _quantize(exported: bytes, file: Path) -> None:
    # quantize_dynamic advises on the root logger to optimise the graph first; the session does it.
    # Were there no handler, logging would install one that repeats every later message.
    root, silent = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(silent)
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            onnx.load_model_from_string(exported),
            file,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        root.setLevel(level)
        root.removeHandler(silent)


@contextmanager
def _quiet_export() -> Generator[None]:
    with warnings.catch_warnings():
        # The replacement exporter needs onnxscript; parity with PyTorch is checked after this one.
        warnings.filterwarnings(
            "ignore", message="You are using the legacy TorchScript", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx")
        warnings.filterwarnings("ignore", category=TracerWarning)
        yield
