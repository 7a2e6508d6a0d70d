"""What becomes of a CPU's freed memory (glibc, so Linux; elsewhere these functions do nothing).

glibc gives large blocks back to the system as soon as they are freed. The next layer asks for as much again, and
the system hands it out zeroed, in pages of 4 KB: this took a quarter of a training step.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """From now on the process keeps what it frees, for its next allocation."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
