"""Store and compute the encoder in fewer bits, and prove that it still is the same encoder.

The last step of a chain: what it writes is executed, not trained on. The user model is small and
stays in float32. An encoder whose float32 export differs from PyTorch, in which padding reaches a
vector, or whose vectors turn by more than the limits, is not written at all.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import polars as pl
import torch
from numpy.typing import NDArray

from recflow.compression import graphs
from recflow.compression.config import QuantizationConfig
from recflow.compression.export import check_padding, check_parity, export_encoder, parity_cases
from recflow.compression.recovery import evenly_drawn, validation_auc
from recflow.core.errors import ArtifactError, ConfigError, ParityError
from recflow.modeling.batching import items_in_use
from recflow.modeling.encoder import (
    WEIGHTS_NAME,
    TorchRuntime,
    describe_encoder,
    hold_in_bfloat16,
    save_encoder,
    torch_threads,
)
from recflow.modeling.layout import BF16, ONNXRUNTIME, TORCH, read_ranker_config
from recflow.modeling.onnx_runtime import ONNX_NAME, OnnxRuntime
from recflow.modeling.ranker import (
    Ranker,
    count_parameters,
    load_encoder,
    load_parts,
    save_parts,
)
from recflow.modeling.texts import TOKENIZER_NAME, EncoderRuntime, TextTokenizer
from recflow.modeling.tracking import Tracker

_PADDED_TEXTS: Final = 16
_CALIBRATION_BATCH: Final = 16


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What quantization did.

    Attributes:
        precision: Of the encoder's weights.
        parity_cases: Batches compared between PyTorch and the float32 export; 0 where nothing is
            exported.
        parity_max_difference: Largest difference of a vector element over all of them.
        padding_difference: Largest distance, 1 - cosine, of a text's vector alone and beside longer
            texts, as written.
        mean_cosine: Mean cosine between the vectors as written and PyTorch's in float32.
        min_cosine: Lowest of them.
        parent_bytes: Size of the parent's encoder weights.
        bytes: Size of the encoder as written.
        parent_validation_auc: Mean AUC of the parent in float32 on (a part of) validation.
        validation_auc: The written ranker's on the same impressions.
        seconds: Wall time.
    """

    precision: str
    parity_cases: int
    parity_max_difference: float
    padding_difference: float
    mean_cosine: float
    min_cosine: float
    parent_bytes: int
    bytes: int
    parent_validation_auc: float
    validation_auc: float
    seconds: float


def quantize_ranker(
    *,
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: QuantizationConfig,
    tracker: Tracker,
) -> QuantizationReport:
    """Write a ranker whose encoder is stored and computed in another precision.

    Args:
        parent: Directory of a PyTorch ranker in float32.
        output: Existing empty directory.
        items: Item features.
        train: Impressions; the texts of their items are what ranges are fitted and vectors are
            compared on.
        validation: Impressions that only report the accuracy.
        config: Precision and limits.
        tracker: Told the limits and what came out.

    Raises:
        ConfigError: The parent is quantized already.
        ArtifactError: The parent is not a complete ranker, or there are no texts.
        ContractError: An item is not in the item table.
        ParityError: A limit of ``config`` is broken. Nothing is written.
    """
    started = time.monotonic()
    described = read_ranker_config(parent)
    _require_float32(described)
    encoder = load_encoder(parent, described)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    index = items_in_use(items, [train], parts.user_model.shape.history_length)
    if not index.texts:
        raise ArtifactError("train has no item texts to compare the quantized encoder on")
    tracker.log_params(asdict(config))

    tokens = sorted(tokenizer(sorted(set(index.texts))), key=len)
    sample = _spread(tokens, config.sample_texts)
    padded = _spread(sample, _PADDED_TEXTS)
    reference = TorchRuntime(encoder, config.threads, mixed=False)
    check_padding(reference, "PyTorch", padded, config.parity_tolerance)
    with tempfile.TemporaryDirectory() as folder:
        if config.precision == BF16:
            cases, difference = [], 0.0
            file = Path(folder) / WEIGHTS_NAME
            save_encoder(encoder, file, torch.bfloat16)
            rounded = load_encoder(parent, described)
            hold_in_bfloat16(rounded)
            runtime: EncoderRuntime = TorchRuntime(rounded, config.threads)
            execution = {"runtime": TORCH, "encoder": describe_encoder(encoder)}
        else:
            exported = export_encoder(encoder)
            float32 = OnnxRuntime(exported, config.threads)
            cases = parity_cases(sample)
            with torch_threads(config.threads):
                difference = check_parity(encoder, float32, cases, config.parity_tolerance)
            check_padding(float32, "the ONNX export", padded, config.parity_tolerance)
            file = Path(folder) / ONNX_NAME
            file.write_bytes(quantize_graph(exported, tokens, config))
            runtime = OnnxRuntime(file, config.threads)
            execution = {"runtime": ONNXRUNTIME}
        cosines = _cosines(runtime, reference, sample)
        _require_cosines(cosines, config)
        padding = check_padding(
            runtime, f"the encoder in {config.precision}", padded, config.padding_tolerance
        )
        shutil.copyfile(file, output / file.name)
    save_parts(
        output,
        tokenizer.path,
        parts,
        runtime={**execution, "precision": config.precision},
        encoder_parameters=count_parameters(encoder),
    )
    some = evenly_drawn(validation, config.max_validation_impressions)
    parent_auc, auc = (
        validation_auc(Ranker(executed, tokenizer, parts), items, some)
        for executed in (reference, runtime)
    )
    report = QuantizationReport(
        precision=config.precision,
        parity_cases=len(cases),
        parity_max_difference=difference,
        padding_difference=padding,
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        parent_bytes=(parent / WEIGHTS_NAME).stat().st_size,
        bytes=(output / file.name).stat().st_size,
        parent_validation_auc=parent_auc,
        validation_auc=auc,
        seconds=time.monotonic() - started,
    )
    tracker.log_metrics({"validation_auc": auc, "cosine": report.mean_cosine}, step=0)
    return report


def quantize_graph(
    exported: bytes, tokens: Sequence[list[int]], config: QuantizationConfig
) -> bytes:
    """The float32 graph of an encoder in the precision of ``config``.

    Args:
        exported: Of :func:`recflow.compression.export.export_encoder`.
        tokens: Token ids of texts of train, shortest first.
        config: Its precision is not ``bf16``, which is PyTorch's.
    """
    model = onnx.load_model_from_string(exported)
    if config.precision == "fp16":
        graphs.store_halves(model)
    elif config.precision == "int4":
        graphs.quantize_tables(model)
        model = graphs.quantize_blocks(model, config.block_size)
    elif config.precision.startswith("int8"):
        texts = _spread(tokens, config.calibration_texts)
        batches = [
            texts[start : start + _CALIBRATION_BATCH]
            for start in range(0, len(texts), _CALIBRATION_BATCH)
        ]
        if config.smoothing:
            seen = graphs.observe(model, batches, threads=config.threads)
            graphs.smooth(model, seen, config.smoothing)
        graphs.quantize_tables(model)
        if config.precision == "int8_static":
            seen = graphs.observe(
                model,
                batches,
                threads=config.threads,
                percentile=config.calibration == "percentile",
            )
            graphs.quantize_statically(model, seen)
        else:
            model = graphs.quantize_dynamically(model)
    return model.SerializeToString()


def _require_float32(described: dict[str, Any]) -> None:
    precision = described.get("precision", "fp32")
    if described["runtime"] != TORCH or precision == BF16:
        raise ConfigError.of(
            "parent",
            f"a ranker in {precision}, executed by {described['runtime']}",
            "a PyTorch ranker in float32: quantization comes last in a chain",
        )


def _spread(tokens: Sequence[list[int]], limit: int) -> list[list[int]]:
    """At most ``limit`` texts at even distances; so of all lengths, as they come by length."""
    places = np.linspace(0, len(tokens) - 1, min(limit, len(tokens))).round().astype(np.int64)
    return [tokens[place] for place in places]


def _cosines(
    runtime: EncoderRuntime, reference: EncoderRuntime, tokens: list[list[int]]
) -> NDArray[np.float32]:
    """Cosine between the vectors of two runtimes, in batches of similar length."""
    cosines = []
    for start in range(0, len(tokens), _CALIBRATION_BATCH):
        batch = tokens[start : start + _CALIBRATION_BATCH]
        cosines.append(np.einsum("ij,ij->i", runtime(batch), reference(batch)))
    return np.concatenate(cosines)


def _require_cosines(cosines: NDArray[np.float32], config: QuantizationConfig) -> None:
    for name, value, least in (
        ("a mean", cosines.mean(), config.min_mean_cosine),
        ("a lowest", cosines.min(), config.min_cosine),
    ):
        if not value >= least:
            raise ParityError(
                f"vectors in {config.precision} have {name} cosine of {value:.4f} to float32, "
                f"allowed is {least} or more; it is not written"
            )
