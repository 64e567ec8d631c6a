"""Texts on their way into an encoder: tokens, length buckets, padding.

Knows no tensor library, so that a process that runs ONNX models need not load PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from recflow.core.errors import ArtifactError

TOKENIZER_NAME = "tokenizer.json"

BUCKET_SIZE = 64
"""Texts encoded together. Larger buckets hold more padding and more memory for no speed on CPUs."""

Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]


class EncoderRuntime(Protocol):
    """Executes an encoder on texts of similar length."""

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        ...

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        """Unit vectors ``[texts, dimension]`` of token ids."""
        ...


class TextTokenizer:
    """WordPiece, BPE or any other fast tokenizer, cut to a number of tokens.

    Attributes:
        max_tokens: Longest sequence, special tokens included.
        path: The ``tokenizer.json`` it was read from.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        """Read ``path``.

        Raises:
            ArtifactError: The file is missing or is not a tokenizer.
        """
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; the model directory needs its tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises nothing narrower
            raise ArtifactError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=max_tokens)
        self.max_tokens = max_tokens
        self.path = path

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included; no padding, at least one each."""
        # Some decoders' tokenizers add no special token: an empty text would have none at all.
        return [encoding.ids or [0] for encoding in self._tokenizer.encode_batch_fast(list(texts))]


def length_buckets(lengths: Rows, size: int = BUCKET_SIZE) -> Iterator[Rows]:
    """Positions of texts of similar length, shortest first, at most ``size`` together."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def token_mask(lengths: Rows) -> NDArray[np.bool_]:
    """True where a text has a token, ``[texts, longest]``."""
    return np.arange(lengths.max()) < lengths[:, None]


def pad_tokens(tokens: Sequence[Sequence[int]]) -> tuple[Rows, NDArray[np.bool_]]:
    """Token ids ``[texts, longest]`` padded with 0, and where there is a token.

    The padding value is never seen: the mask hides it from attention and from pooling.
    """
    mask = token_mask(np.array([len(text) for text in tokens], dtype=np.int64))
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = [token for text in tokens for token in text]
    return ids, mask


def encode_texts(
    runtime: EncoderRuntime, tokenizer: TextTokenizer, texts: Sequence[str]
) -> Vectors:
    """Unit vectors ``[texts, dimension]``: tokenised, in length buckets, back in order."""
    tokens = tokenizer(texts)
    vectors = np.empty((len(tokens), runtime.dimension), dtype=np.float32)
    for bucket in length_buckets(np.array([len(text) for text in tokens], dtype=np.int64)):
        vectors[bucket] = runtime([tokens[i] for i in bucket])
    return vectors
