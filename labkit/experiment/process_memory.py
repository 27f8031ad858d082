"""Memory of this process on the host."""

from __future__ import annotations

import os
import resource


def resident_bytes() -> int:
    """Return the resident memory of this process (bytes); its peak if the kernel cannot be asked now."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak of the resident memory of this process (bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
