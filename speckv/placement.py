"""Where the weights of a model lie in memory.

A pass of a small model over a few tokens is one read of all its weights. As transformers leaves them, mapped from a
file in pages of 4 KiB, the processor must find the place of each page anew in every pass, and forgets meanwhile where
everything else lies.
"""

import mmap
from pathlib import Path

import torch

LARGE_PAGE = 2 << 20
LINE = 64  # bytes, of a cache
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages(model) -> bool:
    """Move the floating-point parameters on the CPU into large pages, one behind the other; returns whether it was.

    Only where they lie changes: parameters stay the objects they are, tied ones tied. What was mapped from a file is
    no longer shared with other processes that map it. Systems without large pages (those other than Linux, or where
    they are switched off) are left alone.
    """
    if not _has_large_pages():
        return False
    parameters = [parameter for parameter in model.parameters()
                  if parameter.device.type == "cpu" and parameter.is_floating_point() and parameter.is_contiguous()]
    size = sum(_room(parameter) for parameter in parameters)
    if size < LARGE_PAGE:
        return False
    pages = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(pages, dtype=torch.uint8)  # holds on to the pages
    start, moved = -room.data_ptr() % LARGE_PAGE, {}
    for parameter in parameters:
        key = (parameter.data_ptr(), parameter.dtype, parameter.shape)
        if key not in moved:
            count = parameter.numel() * parameter.element_size()
            moved[key] = room[start:start + count].view(parameter.dtype).view(parameter.shape).copy_(parameter.data)
            start += _room(parameter)
        parameter.data = moved[key]  # lets go of the old one, where it has memory of its own
    return True


def _has_large_pages():
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SWITCH.read_text()
    except OSError:
        return False


def _room(parameter):
    """Bytes that a parameter takes, to the end of a cache line."""
    return -(-parameter.numel() * parameter.element_size() // LINE) * LINE
