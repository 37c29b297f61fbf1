"""How this process asks the kernel for memory."""

import ctypes

# mallopt's names for its settings, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc refuses more


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next allocation; returns whether it does.

    By default it maps every large tensor anew and gives it back when it is freed, and the kernel clears each page at
    its first use: 20,000 to 32,000 pages in a training step of SmolLM2's head, 0 to 3,000 with this. Tensors over 32 MB
    are mapped all the same. The process holds on to its peak until it ends, so this is for commands, not for a library.
    Where there is no glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD), (M_TOP_PAD, 256 << 20))
    return all([mallopt(name, value) for name, value in settings])
