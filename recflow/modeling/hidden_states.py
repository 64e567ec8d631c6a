"""Hidden states at the input of one encoder layer, computed once and kept on disk.

Below the lowest layer that learns, an encoder gives the same states for the same text all run long,
and tomorrow again. They are computed once, written to immutable segment files, and read through a
memory map, so that neither the epochs of a run nor the next retraining run those layers again.

The store is keyed twice. A folder belongs to one SHA-256 of everything that decides the states but
the text: configuration and weights of the embeddings and of the layers below, the layer, the
precision, the kind of device. Inside it a text is a 128-bit hash of its token ids, so tokenizer and
cut length need no key of their own: they enter through the ids.

Which texts share a batch must not show in the bits, or a run with a warm store would differ from
the cold one that filled it. Padding does change bits, and so can the number of rows. So texts are
only ever encoded with others of exactly their length, a fixed number of rows at a time (a short
batch is filled up with repeats): the shape of every matrix product, and with it the kernel, depends
on the text's own length alone. A text's states are then the same in any run on one machine with
one number of threads; whatever computed them first, all later runs read these very bits.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recflow.core.errors import ArtifactError, ConfigError, TransientError
from recflow.modeling.encoder import TextEncoder, weights_digest
from recflow.modeling.texts import Rows

_LAYOUT: Final = "2"  # part of the key: raise it when states or files change
_KEY: Final = re.compile("[0-9a-f]{64}")
_SUFFIX: Final = ".safetensors"
_HASH_BYTES: Final = 16
_SEGMENT_BYTES: Final = 64 * 1024**2  # serialising takes about three times this much memory
_STALE_SECONDS: Final = 3600.0  # a temporary file as old as this was left by a killed run
_DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BATCH_TOKENS: Final = {"cpu": 512}  # more gains nothing on CPUs and fills up more short batches
_OTHER_BATCH_TOKENS: Final = 16_384
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class HiddenStates:
    """States of the texts of a run, mapped from the segments that hold them.

    Attributes:
        lengths: Tokens of each text.
        seconds: Time spent computing what was missing.
        computed: Texts computed for this call, here or by a process that shares the work.
        reused: Texts that were there already; like ``computed``, equal ones count once.
    """

    def __init__(
        self, found: list[_Place], lengths: Rows, empty: Tensor, *, seconds: float, computed: int
    ) -> None:
        """Map the segments of ``found``; ``empty`` gives width and dtype."""
        segments = list(dict.fromkeys(place.segment for place in found))
        number_of = {segment: number for number, segment in enumerate(segments)}
        self.lengths, self.seconds, self.computed = lengths, seconds, computed
        self.reused = len({(place.segment, place.start) for place in found}) - computed
        self._empty = empty
        self._states = [segment.states for segment in segments]
        self._segments = np.array([number_of[place.segment] for place in found], dtype=np.int64)
        self._starts = np.array([place.start for place in found], dtype=np.int64)

    def gather(self, rows: Rows) -> Tensor:
        """States of some texts end to end, ``[sum of their lengths, width]``.

        Args:
            rows: Numbers of the texts, in the order wanted; a text may occur several times.
        """
        lengths, segments = self.lengths[rows], self._segments[rows]
        ends = np.cumsum(lengths)
        gathered = self._empty.new_empty((int(lengths.sum()), self._empty.shape[1]))
        for number in np.unique(segments):
            chosen = segments == number
            source = _positions(self._starts[rows[chosen]], lengths[chosen])
            target = _positions((ends - lengths)[chosen], lengths[chosen])
            gathered[target] = self._states[number][source]
        return gathered


class HiddenStateStore:
    """A folder of hidden states, one sub-folder a key.

    Any number of processes may fill and read it at once: a segment appears whole or not at all,
    and never changes.
    """

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Use ``directory``, which all keys share, for at most ``max_bytes``."""
        self._directory, self._max_bytes = directory, max_bytes

    def states(
        self,
        encoder: TextEncoder,
        tokens: list[list[int]],
        *,
        layer: int,
        precision: str,
        on_texts: Callable[[int], None] = lambda _: None,
        share: tuple[int, int] = (0, 1),
        barrier: Callable[[], None] = lambda: None,
    ) -> HiddenStates:
        """Hidden states of texts at the input of ``layer``; computes only what is not stored.

        Where the store grows over its limit, the folders of other keys make room, the one that was
        not used for longest first.

        Args:
            encoder: In evaluation mode.
            tokens: Token ids of each text; equal texts are computed once.
            layer: The layer; 0 for the output of the embeddings.
            precision: ``bf16`` computes under autocast and stores bfloat16, ``fp32`` float32.
            on_texts: Told how many texts were computed after each batch.
            share: Number of this process and of all that fill the store together. Each computes
                its part of what is missing, and whatever of the others' parts it cannot see.
            barrier: Waits for the other processes; each calls it as often as the others.

        Raises:
            ConfigError: The states need more than ``max_bytes``, the folder cannot be written, or
                ``precision`` is unknown.
            ArtifactError: A segment is damaged or belongs to another key.
            TransientError: The disk is full, or another run takes the room.
        """
        if precision not in _DTYPES:
            raise ConfigError.of("precision", precision, ", ".join(_DTYPES))
        assert not encoder.training, "dropout would be stored"
        computer = _Computer(encoder, layer, precision)
        folder = _KeyFolder(self._directory, computer.key)
        hashes = [_hash_of(text) for text in tokens]
        distinct = dict(zip(hashes, tokens, strict=True))
        self._require_fit(sum(map(len, distinct.values())) * computer.token_bytes, len(distinct))

        if share[0] == 0:
            missing = _missing(distinct, folder.open())
            room = sum(len(distinct[text]) for text in missing) * computer.token_bytes
            self._make_room(folder, room)
        barrier()
        missing = _missing(distinct, folder.open())
        barrier()  # all must see the same as missing before anybody adds to it
        started = time.monotonic()
        stored = _fill_together(folder, computer, distinct, missing, on_texts, share, barrier)
        return HiddenStates(
            [stored[text] for text in hashes],
            np.array([len(text) for text in tokens], dtype=np.int64),
            computer.empty,
            seconds=time.monotonic() - started,
            computed=len(missing),
        )

    def _require_fit(self, needed: int, texts: int) -> None:
        if needed > self._max_bytes:
            raise ConfigError.of(
                "max_cache_bytes",
                self._max_bytes,
                f"at least {needed} for these {texts} texts; raise it, lower max_tokens, train on "
                "fewer days, or switch cache_hidden_states off",
            )

    def _make_room(self, folder: _KeyFolder, needed: int) -> None:
        """Create the folder and remove others, and at last its own segments, until it fits."""
        folder.touch()
        for leftover in self._directory.glob("*/.*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    leftover.unlink()
        # Nothing but folders of keys is ever removed, whatever else is kept beside them.
        keys = [path for path in self._directory.iterdir() if _KEY.fullmatch(path.name)]
        sizes = {path: _bytes_below(path) for path in keys}
        # Its own folder comes last; then everything of this run is computed again, and fits.
        keys.sort(key=lambda path: (path == folder.path, _last_used(path), path.name))
        for path in keys:
            if sum(sizes.values()) + needed <= self._max_bytes:
                return
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]
        folder.touch()


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """States ``[tokens, width]`` of one file; equal only to itself."""

    states: Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the states of a text begin."""

    segment: _Segment
    start: int


class _KeyFolder:
    """The segments of one key."""

    def __init__(self, directory: Path, key: str) -> None:
        self.path, self._key = directory / key, key

    def touch(self) -> None:
        """Create the folder, and note that it was used.

        Raises:
            ConfigError: It cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            os.utime(self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def open(self) -> dict[bytes, _Place]:
        """Map all segments: the place of every stored text by its hash.

        Raises:
            ArtifactError: A segment is damaged or belongs to another key.
        """
        places: dict[bytes, _Place] = {}
        for file in sorted(self.path.glob(f"*{_SUFFIX}")):
            if file.name.startswith("."):
                continue
            with suppress(FileNotFoundError):  # another run made room for itself meanwhile
                places |= self._places_in(file)
        return places

    def write(self, hashes: list[bytes], states: list[Tensor]) -> None:
        """Write one segment; its name follows from the texts, so equal ones replace each other.

        Raises:
            TransientError: The disk is full.
            ConfigError: The folder cannot be written.
        """
        content = save(
            {
                "states": torch.cat(states),
                "offsets": torch.tensor(np.cumsum([0, *map(len, states)])),
                "hashes": torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8),
            },
            metadata={"key": self._key},
        )
        name = hashlib.blake2b(b"".join(hashes), digest_size=_HASH_BYTES).hexdigest()
        temporary = self.path / f".{uuid.uuid4().hex}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / f"{name}{_SUFFIX}")
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise TransientError(
                    f"the disk of {self.path} is full; free {len(content)} bytes or set "
                    "max_cache_bytes lower. What was computed before is kept"
                ) from error
            raise self._unwritable(error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _places_in(self, file: Path) -> dict[bytes, _Place]:
        try:
            with safe_open(file, framework="pt", device="cpu") as content:
                key = (content.metadata() or {}).get("key")
                states = content.get_tensor("states")  # mapped, not read
                starts: list[int] = content.get_tensor("offsets").tolist()
                hashes = content.get_tensor("hashes").numpy().tobytes()
        except SafetensorError as error:
            raise self._unusable(file, f"is damaged ({error})") from error
        if key != self._key:
            raise self._unusable(file, f"belongs to the key {key}")
        if (
            not starts
            or starts[-1] != len(states)
            or len(hashes) != (len(starts) - 1) * _HASH_BYTES
        ):
            raise self._unusable(file, "is damaged (its parts do not fit together)")
        segment = _Segment(states)
        return {
            hashes[number * _HASH_BYTES : (number + 1) * _HASH_BYTES]: _Place(segment, start)
            for number, start in enumerate(starts[:-1])
        }

    def _unusable(self, file: Path, why: str) -> ArtifactError:
        return ArtifactError(
            f"{file} {why}; delete the folder {self.path}, its states will be computed again"
        )

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"hidden states cannot be kept in {self.path}: {error}. Make the folder writable, "
            "name another one, or switch cache_hidden_states off"
        )


class _Computer:
    """Runs the lower layers of one encoder.

    Attributes:
        key: SHA-256 of everything but the text that decides its states.
        empty: No states, ``[0, width]``, in the stored dtype.
    """

    def __init__(self, encoder: TextEncoder, layer: int, precision: str) -> None:
        self._encoder, self._layer, self._precision = encoder, layer, precision
        self._device = next(encoder.parameters()).device
        self.empty = torch.empty((0, encoder.width), dtype=_DTYPES[precision])
        kind = "open" if encoder.attends_openly else "fused"
        parts = [_LAYOUT, weights_digest(encoder, layer), str(layer), precision, kind]
        parts.append(self._device.type)
        self.key = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def token_bytes(self) -> int:
        """Stored bytes of one token."""
        return self.empty.shape[1] * self.empty.element_size()

    def fill(
        self,
        folder: _KeyFolder,
        tokens: dict[bytes, list[int]],
        missing: list[bytes],
        on_texts: Callable[[int], None],
    ) -> None:
        """Compute the states of some texts and write them, a segment at a time."""
        hashes: list[bytes] = []
        states: list[Tensor] = []
        gathered = 0
        for batch in self._batches(tokens, missing):
            computed = self._run([tokens[text] for text in batch])
            hashes += batch
            states += computed
            gathered += sum(map(len, computed)) * self.token_bytes
            if gathered >= _SEGMENT_BYTES:
                folder.write(hashes, states)
                hashes, states, gathered = [], [], 0
            on_texts(len(batch))
        if hashes:
            folder.write(hashes, states)

    def _rows(self, length: int) -> int:
        """Texts of this length in a batch."""
        return max(1, _BATCH_TOKENS.get(self._device.type, _OTHER_BATCH_TOKENS) // length)

    def _batches(
        self, tokens: dict[bytes, list[int]], missing: list[bytes]
    ) -> Iterator[list[bytes]]:
        """Texts of exactly equal length, at most a batch of them together; shortest first."""
        by_length: dict[int, list[bytes]] = {}
        for text in missing:
            by_length.setdefault(len(tokens[text]), []).append(text)
        for length, texts in sorted(by_length.items()):
            rows = self._rows(length)
            for start in range(0, len(texts), rows):
                yield texts[start : start + rows]

    def _run(self, batch: list[list[int]]) -> list[Tensor]:
        """States ``[tokens, width]`` of each text of a batch."""
        rows = self._rows(len(batch[0]))
        filled = (batch * rows)[:rows]
        ids = torch.tensor(filled, device=self._device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        half = self._precision == "bf16"
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            hidden = self._encoder.run_layers(self._encoder.embed(ids), mask, 0, self._layer)
        return list(hidden[: len(batch)].to("cpu", self.empty.dtype).unbind())


def _fill_together(
    folder: _KeyFolder,
    computer: _Computer,
    tokens: dict[bytes, list[int]],
    missing: list[bytes],
    on_texts: Callable[[int], None],
    share: tuple[int, int],
    barrier: Callable[[], None],
) -> dict[bytes, _Place]:
    """Compute this process' part of what is missing; the places of all texts afterwards."""
    rank, world = share
    # Neighbours are of equal length, so every part has about as many tokens.
    computer.fill(folder, tokens, missing[rank::world], on_texts)
    barrier()
    stored = folder.open()
    left = _missing(tokens, stored)
    if left:  # the processes share no disk, or another run made room for itself meanwhile
        computer.fill(folder, tokens, left, on_texts)
        stored = folder.open()
    if _missing(tokens, stored):
        raise TransientError(
            f"{folder.path} loses segments while it is filled: another run makes room for itself. "
            "Raise max_cache_bytes, or run one after the other"
        )
    return stored


def _missing(tokens: dict[bytes, list[int]], stored: dict[bytes, _Place]) -> list[bytes]:
    """Texts that are not stored, by length and then hash: any order of texts gives the same."""
    return sorted(tokens.keys() - stored.keys(), key=lambda text: (len(tokens[text]), text))


def _hash_of(text: list[int]) -> bytes:
    ids = np.array(text, dtype="<i8").tobytes()
    return hashlib.blake2b(ids, digest_size=_HASH_BYTES).digest()


def _positions(starts: Rows, lengths: Rows) -> Tensor:
    """``starts[i]``, ``starts[i] + 1``, … for ``lengths[i]`` positions, end to end."""
    begins = np.cumsum(lengths) - lengths
    return torch.from_numpy(np.arange(int(lengths.sum())) + np.repeat(starts - begins, lengths))


def _bytes_below(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
