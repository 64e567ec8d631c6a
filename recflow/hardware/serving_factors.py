"""What the two runtimes that serve an encoder hold and reach.

The form of each number is fixed by what the runtime does (:mod:`recflow.hardware.inference` says
what that is). What is held in memory was fitted to fresh processes with BERT encoders of three
sizes and checked on five others. The times of a processor were fitted to every second encoder of
``make bench-serving-plan`` and checked on the others; those of GPUs are published or assumed, so
that plans made of them do not call themselves calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from recflow.hardware.device import Device

_MEBIBYTE: Final = 1 << 20
_TILES: Final = 4  # times the rate of float32: vector units multiply bfloat16 twice as fast


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one runtime is in one precision.

    Attributes:
        matrix_share: Share of the device's matrix rate that large batches reach.
        bandwidth_share: Share of the bandwidth that weights are streamed at; above 1 where the
            caches hold a part of them.
        activation_share: The same of activations, and of the work on each of them.
        layer_seconds: Seconds a layer takes beside its work: operators to dispatch or launch.
        call_seconds: Seconds a call takes beside its layers: padding, embedding, pooling.
    """

    matrix_share: float
    bandwidth_share: float
    activation_share: float
    layer_seconds: float
    call_seconds: float


@dataclass(frozen=True, slots=True)
class ServingFactors:
    """Factors of one kind of device.

    Attributes:
        is_measured: Whether memory and times were fitted on such a device.
        speeds: By ``runtime/precision``; ``torch/autocast`` is a float32 model whose matrices are
            rounded to bfloat16 at every call.
        context_bytes: Memory of a process that has imported what a runtime needs, by runtime;
            ``scoring`` is that of ONNX Runtime beside PyTorch, which runs the user model.
        device_context_bytes: Memory that a GPU's driver and libraries hold.
        packing: Bytes that ONNX Runtime holds for a byte of matrices, by precision; of ``fp16``,
            for a byte of the matrices widened to float32.
        widening: Share of the widened matrices that loading ``fp16`` takes beside them.
        token_bytes: Memory of a tokenizer by token of its vocabulary.
        text_seconds: Seconds to tokenise a text and put it into its batch.
        score_seconds: Seconds to rank the candidates of one user, beside the arithmetic.
        kernel_bytes: Bytes that each size of a matrix and of a batch takes in bfloat16: oneDNN's
            kernel, and blocks of the heap that other sizes cannot use again.
        allocator: Bytes held for a byte of activations, by precision where it matters, else by
            runtime.
        source: Where the factors are from.
    """

    is_measured: bool
    speeds: Mapping[str, Speed]
    context_bytes: Mapping[str, int]
    device_context_bytes: int
    packing: Mapping[str, float]
    widening: float
    token_bytes: float
    text_seconds: float
    score_seconds: float
    kernel_bytes: float
    allocator: Mapping[str, float]
    source: str

    def speed(self, runtime: str, precision: str, *, half: bool) -> Speed:
        """Speed of a runtime in a precision.

        Args:
            runtime: What executes the model.
            precision: What it is stored in.
            half: Whether PyTorch multiplies in bfloat16.
        """
        if runtime != "torch":
            # float16 is widened when it is loaded: the same products as float32.
            precision = "fp32" if precision == "fp16" else precision
        elif not half:
            precision = "fp32"
        elif precision == "fp32":
            precision = "autocast"
        return self.speeds[f"{runtime}/{precision}"]


def default_factors(device: Device) -> ServingFactors:
    """Factors of a kind of device.

    Nothing was measured on processors that multiply tiles, as AMX does: their plans have the
    factors of vector units and do not call themselves calibrated.
    """
    if device.is_gpu:
        return _GPU
    rates = device.teraflops
    if rates.get("bf16", 0.0) > _TILES * rates["fp32"]:
        return replace(
            _CPU, is_measured=False, source=f"of vector units, not of tiles: {_CPU.source}"
        )
    return _CPU


_CPU: Final = ServingFactors(
    is_measured=True,
    speeds=MappingProxyType(
        {
            "torch/fp32": Speed(0.426, 0.566, 0.192, 226e-6, 390e-6),
            "torch/autocast": Speed(0.799, 1.56, 0.305, 483e-6, 466e-6),
            "torch/bf16": Speed(0.873, 0.824, 0.27, 350e-6, 601e-6),
            "onnxruntime/fp32": Speed(0.897, 1.09, 0.392, 24e-6, 0.0),
            "onnxruntime/int8_static": Speed(0.838, 1.05, 0.347, 43e-6, 0.0),
            "onnxruntime/int8_dynamic": Speed(0.898, 1.01, 0.353, 45e-6, 0.0),
            "onnxruntime/int4": Speed(0.283, 1.37, 0.195, 42e-6, 0.0),
        }
    ),
    context_bytes=MappingProxyType(
        {
            "onnxruntime": 63 * _MEBIBYTE,
            "scoring": 333 * _MEBIBYTE,
            "torch": 452 * _MEBIBYTE,
        }
    ),
    device_context_bytes=0,
    packing=MappingProxyType(
        {"fp32": 1.45, "fp16": 1.35, "int8_dynamic": 1.78, "int8_static": 1.36, "int4": 2.15}
    ),
    widening=0.25,
    token_bytes=200.0,
    text_seconds=25e-6,
    score_seconds=2.0e-3,
    kernel_bytes=0.75 * _MEBIBYTE,
    allocator=MappingProxyType(
        {
            "torch": 1.1,
            "onnxruntime": 1.1,
            "int8_dynamic": 0.95,
            "int8_static": 1.28,
            "int4": 1.55,
        }
    ),
    source="python -m recflow_tests.benchmarks.serving_plan --fit --clock processor, one thread of "
    "an AMD EPYC (Zen 5) with AVX-512, VNNI and bfloat16, while other programs ran",
)

# Published: BERT-large in PyTorch, 384 tokens, batch 4, on one V100 of a DGX-2 gives 35.76 texts a
# second in float32 and 112.60 in mixed precision. At 246 GFLOP a text those are shares of 0.56 and
# 0.22 of the V100's 15.7 TFLOPS in float32 and 125 in half precision.
# https://github.com/NVIDIA/DeepLearningExamples/blob/23a6382cbe8f77c22b0a7b7d263191ee6b947dfa/PyTorch/LanguageModeling/BERT/README.md
# Peaks: https://developer.nvidia.com/programming-tensor-cores-cuda-9-0 (125) and
# https://github.com/avensun/deep-learning-benchmark (both).
# Assumed: that other GPUs, ONNX Runtime and integers reach the shares of these two, the shares of
# the bandwidth, the seconds of a layer and of a call, the driver's memory, and the allocators'.
_GPU: Final = ServingFactors(
    is_measured=False,
    speeds=MappingProxyType(
        {
            "torch/fp32": Speed(0.56, 0.7, 0.7, 150e-6, 500e-6),
            "torch/autocast": Speed(0.22, 0.7, 0.7, 250e-6, 500e-6),
            "torch/bf16": Speed(0.22, 0.7, 0.7, 150e-6, 500e-6),
            "onnxruntime/fp32": Speed(0.56, 0.7, 0.7, 60e-6, 200e-6),
            "onnxruntime/int8_static": Speed(0.22, 0.7, 0.7, 60e-6, 200e-6),
            "onnxruntime/int8_dynamic": Speed(0.22, 0.7, 0.7, 60e-6, 200e-6),
            "onnxruntime/int4": Speed(0.22, 0.7, 0.7, 60e-6, 200e-6),
        }
    ),
    context_bytes=_CPU.context_bytes,
    device_context_bytes=600 * _MEBIBYTE,
    packing=_CPU.packing,
    widening=0.0,
    token_bytes=_CPU.token_bytes,
    text_seconds=_CPU.text_seconds,
    score_seconds=_CPU.score_seconds,
    kernel_bytes=0.0,
    allocator=MappingProxyType({"torch": 1.2, "onnxruntime": 1.2}),
    source="matrix shares of PyTorch from NVIDIA's published BERT-large inference on one V100; "
    "everything else, ONNX Runtime and integers included, is assumed; nothing was measured here",
)
