"""Peak memory of a process, without what its parent used; and giving freed memory back."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def release_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    glibc keeps what was freed below anything that is still in use. Encoding texts of many lengths
    leaves hundreds of megabytes like that (a small long-lived block above each large hole), which
    the next phase of a training would find in its way. Takes milliseconds; to be called between
    phases, not in every step, whose buffers would have to be fetched from the system again.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since its program started.

    Linux' ``ru_maxrss`` survives ``exec``: a small child of a large parent would report the
    parent's memory. ``VmHWM`` does not.
    """
    if _STATUS.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
