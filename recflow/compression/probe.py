"""Load one variant in a fresh process and say what that took.

Started by :mod:`recflow.compression.measure` as ``python -m recflow.compression.probe DIR THREADS``
with the texts as JSON on standard input; answers with one line of JSON. Only the variant's own
runtime is imported, so that the memory of an ONNX model does not include PyTorch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from recflow.modeling.layout import BF16, ONNXRUNTIME, read_ranker_config
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.texts import TOKENIZER_NAME, EncoderRuntime, TextTokenizer, encode_texts


def main(path: Path, threads: int, texts: list[str]) -> dict[str, float]:
    """Load the encoder at ``path`` and encode ``texts``.

    Returns:
        ``load_seconds``, imports not counted, and ``peak_rss_bytes`` of this process.
    """
    config = read_ranker_config(path)
    if config["runtime"] == ONNXRUNTIME:
        from recflow.modeling.onnx_runtime import ONNX_NAME, OnnxRuntime

        started = time.perf_counter()
        runtime: EncoderRuntime = OnnxRuntime(path / ONNX_NAME, threads)
    else:
        from recflow.modeling.encoder import TorchRuntime, build_encoder, hold_in_bfloat16
        from recflow.modeling.ranker import load_encoder

        build_encoder(config["encoder"])  # transformers imports an architecture when it builds one
        started = time.perf_counter()
        encoder = load_encoder(path, config)
        if config.get("precision") == BF16:
            hold_in_bfloat16(encoder)
        runtime = TorchRuntime(encoder, threads)
    tokenizer = TextTokenizer(path / TOKENIZER_NAME, int(config["max_tokens"]))
    load_seconds = time.perf_counter() - started
    encode_texts(runtime, tokenizer, texts)
    return {"load_seconds": load_seconds, "peak_rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    answer = main(Path(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin))
    sys.stdout.write(json.dumps(answer) + "\n")
