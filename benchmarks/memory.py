"""How far a piece of work makes the resident memory of this process rise."""

import ctypes
import gc
from pathlib import Path

from benchmarks.timing import Work


def peak(work: Work) -> int:
    """Bytes by which the high-water mark of resident memory rises above what was resident before.

    The heap is trimmed and the kernel's mark set back first; in a process where nothing else allocates.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    del result
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
