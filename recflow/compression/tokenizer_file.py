"""Cut the vocabulary of a ``tokenizer.json``. Loads no PyTorch.

WordPiece takes the longest piece that matches, Unigram the most likely way to cut a word, byte-pair
encoding (BPE) merges in a fixed order. In all three, a word whose pieces are all kept is cut into
the same pieces as before, because removing other choices does not make a better one: a WordPiece
match stays the longest, a Unigram path the most likely, and BPE keeps the merges that lead to a
kept token. Characters are always kept, so that any other word can still be spelled.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.texts import Rows

# What SentencePiece calls a byte it has no character for, e.g. <0x0A>.
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _Model(ABC):
    """The ``model`` of a tokenizer.json of one kind."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.described = described
        self.tokens: dict[str, int] = self.read_tokens()

    def read_tokens(self) -> dict[str, int]:
        """Number of each token."""
        return self.described["vocab"]

    @property
    def unknown(self) -> int | None:
        """Number of the token for what cannot be spelled, where there is one."""
        return self.tokens.get(self.described.get("unk_token") or "")

    @abstractmethod
    def spelling(self) -> set[int]:
        """Tokens that every other word can be spelled with."""

    def common(self) -> Iterable[str]:
        """Tokens in the order of their numbers, without those that no text can contain."""
        return sorted(self.tokens, key=self.tokens.__getitem__)

    def needed(self, kept: Iterable[int]) -> set[int]:
        """The kept tokens and those without which they are never reached."""
        return set(kept)

    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """The model with these tokens only, by their new numbers."""
        renumbered = {t: numbers[old] for t, old in self.tokens.items() if old in numbers}
        return {**self.described, "vocab": renumbered}


class _WordPiece(_Model):
    def __init__(self, described: dict[str, Any]) -> None:
        super().__init__(described)
        self._prefix: str = described["continuing_subword_prefix"]

    def spelling(self) -> set[int]:
        return {old for t, old in self.tokens.items() if len(t.removeprefix(self._prefix)) == 1}


class _Bpe(_Model):
    def __init__(self, described: dict[str, Any]) -> None:
        super().__init__(described)
        if described["dropout"]:
            raise ConfigError.of("dropout of the tokenizer", described["dropout"], "0")
        prefix = len(described["continuing_subword_prefix"] or "")
        self._merges: list[tuple[int, int, int]] = [
            (self.tokens[left], self.tokens[right], self.tokens[left + right[prefix:]])
            for left, right in described["merges"]
        ]

    def spelling(self) -> set[int]:
        return set(self.tokens.values()) - {merged for _, _, merged in self._merges}

    def needed(self, kept: Iterable[int]) -> set[int]:
        parts: dict[int, list[int]] = {}
        for left, right, merged in self._merges:
            parts.setdefault(merged, []).extend((left, right))
        found, waiting = set(kept), list(kept)
        while waiting:
            new = set(parts.get(waiting.pop(), ())) - found
            found |= new
            waiting += new
        return found

    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        merges = [
            names
            for names, triple in zip(self.described["merges"], self._merges, strict=True)
            if all(token in numbers for token in triple)
        ]
        return {**super().cut(numbers), "merges": merges}


class _Unigram(_Model):
    def read_tokens(self) -> dict[str, int]:
        return {token: number for number, (token, _) in enumerate(self.described["vocab"])}

    @property
    def unknown(self) -> int | None:
        return self.described["unk_id"]

    def spelling(self) -> set[int]:
        scores = [score for _, score in self.described["vocab"]]
        # The score of an unknown character is that of the least likely token and a penalty.
        least_likely = int(np.argmin(scores))
        characters = {old for t, old in self.tokens.items() if len(t) == 1 or t in _BYTE_TOKENS}
        return characters | {least_likely}

    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        vocabulary = self.described["vocab"]
        kept = [vocabulary[old] for old in sorted(numbers) if old < len(vocabulary)]
        unknown = None if self.unknown is None else numbers[self.unknown]
        return {**self.described, "vocab": kept, "unk_id": unknown}


_MODELS: Mapping[str, type[_Model]] = {"WordPiece": _WordPiece, "BPE": _Bpe, "Unigram": _Unigram}


class TrimmableTokenizer:
    """A ``tokenizer.json`` of WordPiece, BPE or Unigram.

    Attributes:
        kinds: Kinds of tokenizers whose vocabulary can be cut.
    """

    kinds: ClassVar = tuple(_MODELS)

    def __init__(self, path: Path) -> None:
        """Read ``path``.

        Raises:
            ArtifactError: The file is missing or is not a tokenizer.
            ConfigError: It is of another kind, or cuts words at random.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises nothing narrower
            raise ArtifactError(f"{path} is not a tokenizer: {error}") from error
        # As the installed library writes it: one notation of merges, whatever the file's age.
        self._described: dict[str, Any] = json.loads(self._tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        model = self._described["model"]
        if model["type"] not in _MODELS:
            raise ConfigError.of("tokenizer to trim", model["type"], ", ".join(_MODELS))
        self._model = _MODELS[model["type"]](model)
        added = {token["content"]: token["id"] for token in self._described["added_tokens"]}
        self._beyond = [old for text, old in added.items() if text not in self._model.tokens]
        self._special = {
            *added.values(),
            *_referred_ids(self._described),
            *([] if self._model.unknown is None else [self._model.unknown]),
            0,  # stands for a text without any token
        }

    @property
    def size(self) -> int:
        """One more than the highest number of a token."""
        return max([*self._model.tokens.values(), *self._beyond]) + 1

    @property
    def unknown(self) -> int | None:
        """Number of the token for what cannot be spelled; None where everything can be."""
        return self._model.unknown

    @property
    def always_kept(self) -> set[int]:
        """Special tokens, and those with which any word can be spelled."""
        return self._special | self._model.needed(self._model.spelling())

    def words(self, texts: Sequence[str], max_tokens: int) -> Iterator[list[int]]:
        """Tokens of the words of each text that begin within its first ``max_tokens`` tokens.

        A word at the limit counts as a whole: without its end, its beginning could be cut
        otherwise.
        """
        for encoding in self._tokenizer.encode_batch(list(texts)):
            ids, words = encoding.ids, encoding.word_ids
            last = max((w for w in words[:max_tokens] if w is not None), default=-1)
            yield [t for t, w in zip(ids, words, strict=True) if w is None or w <= last]

    def most_common(self, count: int) -> set[int]:
        """The ``count`` lowest-numbered tokens that are not kept anyway and that texts can contain.

        Vocabularies are numbered in the order in which training found the tokens worth having, so
        roughly from the most common one on.
        """
        found: set[int] = set()
        always = self.always_kept
        for token in self._model.common():
            if len(found) >= count:
                break
            number = self._model.tokens[token]
            if number not in always and self._can_occur(token):
                found.add(number)
        return found

    def select(self, wanted: Iterable[int]) -> Rows:
        """Complete a selection.

        Args:
            wanted: Numbers of tokens.

        Returns:
            These, the tokens that are always kept, and those they are made of: old numbers in the
            order of the new ones.
        """
        kept = self._model.needed(self.always_kept | set(wanted))
        # The library numbers added tokens that are not of the model behind those that are. Numbers
        # without a token are rows that pad an embedding table.
        inside = sorted(kept & set(self._model.tokens.values()))
        return np.array([*inside, *self._beyond], dtype=np.int64)

    def cut(self, kept: Rows) -> str:
        """The ``tokenizer.json`` with the tokens of :meth:`select` only, renumbered.

        Raises:
            ArtifactError: The library numbers the tokens otherwise.
        """
        numbers = {int(old): new for new, old in enumerate(kept)}
        described = dict(self._described)
        described["model"] = self._model.cut(numbers)
        described["added_tokens"] = [
            {**token, "id": numbers[token["id"]]} for token in described["added_tokens"]
        ]
        if described["post_processor"] is not None:
            described["post_processor"] = _renumbered(described["post_processor"], numbers)
        if described["padding"] is not None:
            pad = numbers[described["padding"]["pad_id"]]
            described["padding"] = {**described["padding"], "pad_id": pad}
        text = json.dumps(described, ensure_ascii=False)
        self._check_numbers(Tokenizer.from_str(text), numbers)
        return text

    def _check_numbers(self, trimmed: Tokenizer, numbers: Mapping[int, int]) -> None:
        names = {old: t for t, old in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        wrong = [old for old, new in numbers.items() if trimmed.token_to_id(names[old]) != new]
        if wrong or trimmed.get_vocab_size() != len(numbers):
            raise ArtifactError(
                f"the trimmed tokenizer has {trimmed.get_vocab_size()} tokens instead of "
                f"{len(numbers)}, and {len(wrong)} have another number than expected"
            )

    def _can_occur(self, token: str) -> bool:
        """Whether the normaliser and the word splitter leave a WordPiece in one piece.

        They do not with the hundreds of ``[unused1]`` at the front of BERT's vocabularies.
        """
        if not isinstance(self._model, _WordPiece) or self._tokenizer.pre_tokenizer is None:
            return True
        text = token.removeprefix(self._described["model"]["continuing_subword_prefix"])
        return len(self._tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _referred_ids(described: Mapping[str, Any]) -> Iterator[int]:
    """Token ids that a tokenizer's padding and post-processor name."""
    if described["padding"] is not None:
        yield described["padding"]["pad_id"]
    processors = [described["post_processor"]]
    while processors:
        processor = processors.pop() or {}
        processors += processor.get("processors", [])
        for token in processor.get("special_tokens", {}).values():
            yield from token["ids"]
        for key in _NAMED:
            if key in processor:
                yield processor[key][1]


_NAMED = ("sep", "cls")


def _renumbered(processor: dict[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """A post-processor with new token ids."""
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_renumbered(part, numbers) for part in processor["processors"]]
    if "special_tokens" in processor:
        changed["special_tokens"] = {
            name: {**token, "ids": [numbers[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    for key in _NAMED:
        if key in processor:
            text, old = processor[key]
            changed[key] = [text, numbers[old]]
    return changed
