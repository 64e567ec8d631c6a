"""Execute an exported encoder with ONNX Runtime on the CPU. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import onnxruntime

from recflow.core.errors import ArtifactError
from recflow.modeling.layout import ONNX_NAME as ONNX_NAME
from recflow.modeling.texts import Vectors, pad_tokens

INPUT_NAMES = ("input_ids", "attention_mask")
OUTPUT_NAME = "vectors"

# On processors the fused operator takes three times as long as addition and normalisation apart:
# a fifth of a whole int8 MiniLM at batch 32.
_SLOWER_FUSIONS = ["SkipLayerNormFusion"]


class OnnxRuntime:
    """An encoder as an ONNX graph: token ids and mask in, unit vectors out."""

    def __init__(self, model: Path | bytes, threads: int | None) -> None:
        """Open a model.

        Args:
            model: File, or its content.
            threads: Threads of an operator; ``None`` leaves that to ONNX Runtime.

        Raises:
            ArtifactError: The file is missing or damaged, or is not an encoder.
        """
        if isinstance(model, Path) and not model.is_file():
            raise ArtifactError(f"{model} is missing; rebuild the model")
        name = str(model) if isinstance(model, Path) else "the exported model"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Idle workers that spin would steal the processor from whatever runs beside the model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_SLOWER_FUSIONS,
            )
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
            raise ArtifactError(f"{name} is not a usable ONNX model: {error}") from error
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        if OUTPUT_NAME not in outputs:
            raise ArtifactError(f"{name} has the outputs {sorted(outputs)}, not {OUTPUT_NAME!r}")
        self.dimension = int(outputs[OUTPUT_NAME][-1])

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        """Encode one padded batch."""
        ids, mask = pad_tokens(tokens)
        feed = dict(zip(INPUT_NAMES, (ids, mask.astype(ids.dtype)), strict=True))
        return cast("Vectors", self._session.run([OUTPUT_NAME], feed)[0])
