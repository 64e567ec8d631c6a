"""Lines of text logs as a lazy table: streaming, exact, tolerant of damaged lines.

Polars reads text either strictly, so that one wrong byte ends the whole scan, or lossily, so that
damage can no longer be told from text. This scan decodes block by block: a block of valid UTF-8
goes to Polars as it is, and only the lines of a damaged block are looked at one by one.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final, cast

import polars as pl
from polars.io.plugins import register_io_source

from recflow.core.columns import Columns
from recflow.core.errors import SourceError

LINE: Final = "line"
NOT_UTF8: Final = "not_utf8"

_BLOCK_BYTES = 4 << 20
_MAX_LINE_BYTES = 64 << 20
_HEAD_BYTES = 256 << 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SCHEMA = pl.Schema(
    {
        Columns.SOURCE_FILE: pl.String,
        Columns.SOURCE_ROW: pl.Int64,
        LINE: pl.String,
        NOT_UTF8: pl.Boolean,
    }
)


def scan_lines(files: Sequence[Path], root: Path) -> pl.LazyFrame:
    """Scan the lines of plain or gzip-compressed text files, in order, in bounded memory.

    Every line yields one row, blank lines too; only the empty text after the last line end is no
    line. A byte-order mark at the start of a file and carriage returns at line ends are removed.

    Args:
        files: The files; names that end in ``.gz`` are decompressed.
        root: Folder that file names are given relative to.

    Returns:
        ``source_file``, ``source_row`` (from 1), ``line`` (bytes that are not UTF-8 replaced by
        U+FFFD) and ``not_utf8`` (whether there were any). Collecting it raises SourceError when a
        file cannot be read to its end.
    """

    def read(
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,  # noqa: ARG001 - a hint; blocks bound the memory already
    ) -> Iterator[pl.DataFrame]:
        left = n_rows
        for file in files:
            for block in _read_blocks(file, file.relative_to(root).as_posix()):
                frame = block if left is None else block.head(left)
                left = None if left is None else left - frame.height
                if with_columns is not None:
                    frame = frame.select(with_columns)
                yield frame if predicate is None else frame.filter(predicate)
                if left == 0:
                    return

    return register_io_source(read, schema=_SCHEMA, is_pure=True)


def check_text_file(file: Path, columns: int, remedy: str) -> None:
    """Look at the start of a file and raise when it cannot be a tab-separated log at all.

    Args:
        file: The file.
        columns: Tab-separated columns a line should have, for the message.
        remedy: What to do, for the message.

    Raises:
        SourceError: The file is empty, not UTF-8 text, cannot be decompressed, or most of its
            first lines have no tab.
    """
    with _readable(file) as stream:
        head = _read(stream, file, _HEAD_BYTES)
    if head.startswith(_UTF16_MARKS):
        raise SourceError(f"{file} is UTF-16 text; save it as UTF-8. {remedy}")
    # As the readers split: a carriage return inside a line does not end it.
    lines = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise SourceError(f"{file} is empty. {remedy}")
    if 2 * sum(b"\t" not in line for line in filled) > len(filled):
        row = next(n for n, line in enumerate(lines, 1) if line.strip() and b"\t" not in line)
        raise SourceError(
            f"{file}, line {row}: no tab found, and most lines are like that; {columns} columns "
            f"separated by tabs are expected{_other_delimiter(filled)}. {remedy}"
        )


def first_line(file: Path) -> str:
    """Return the first line of a text file without its byte-order mark and line end.

    Raises:
        SourceError: The file cannot be read.
    """
    with _readable(file) as stream:
        head = _read(stream, file, _HEAD_BYTES)
    # As the readers split: a carriage return inside a line does not end it.
    lines = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    return lines[0].decode(errors="replace") if lines else ""


def _other_delimiter(lines: list[bytes]) -> str:
    for delimiter in (b",", b";", b"|"):
        if all(delimiter in line for line in lines):
            return f", but these look separated by {delimiter.decode()!r}"
    return ""


def _readable(file: Path) -> IO[bytes]:
    try:
        if file.suffix == ".gz":
            return cast("IO[bytes]", gzip.open(file, "rb"))
        return file.open("rb")
    except OSError as error:
        raise SourceError(f"{file} cannot be opened: {error.strerror or error}") from error


def _read(stream: IO[bytes], file: Path, size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(
            f"{file} is a truncated or damaged gzip file ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror or error}") from error


def _read_blocks(file: Path, name: str) -> Iterator[pl.DataFrame]:
    """Yield the lines of a file in frames of a few megabytes."""
    row = 1
    for block in _whole_lines(file):
        lines = _decode(block)
        yield lines.select(
            pl.lit(name).alias(Columns.SOURCE_FILE),
            pl.int_range(row, row + lines.height, dtype=pl.Int64).alias(Columns.SOURCE_ROW),
            LINE,
            NOT_UTF8,
        )
        row += lines.height


def _whole_lines(file: Path) -> Iterator[bytes]:
    """Yield blocks that end where a line ends."""
    with _readable(file) as stream:
        rest = b""
        fresh = _read(stream, file, _BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK)
        while fresh:
            end = fresh.rfind(b"\n") + 1
            if end:
                yield rest + fresh[:end]
                rest = fresh[end:]
            else:
                rest += fresh
            if len(rest) > _MAX_LINE_BYTES:
                raise SourceError(
                    f"{file} has a line longer than {_MAX_LINE_BYTES >> 20} MiB; "
                    "it is no log of one impression or item a line"
                )
            fresh = _read(stream, file, _BLOCK_BYTES)
        if rest:
            yield rest


def _decode(block: bytes) -> pl.DataFrame:
    """Split a block into lines; ``not_utf8`` marks those with undecodable bytes."""
    try:
        block.decode()
    except UnicodeDecodeError:
        lines = [line.removesuffix(b"\r") for line in block.removesuffix(b"\n").split(b"\n")]
        return pl.DataFrame(
            {
                LINE: [line.decode(errors="replace") for line in lines],
                NOT_UTF8: [not _is_utf8(line) for line in lines],
            }
        )
    return pl.read_lines(block, name=LINE).with_columns(pl.lit(value=False).alias(NOT_UTF8))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
