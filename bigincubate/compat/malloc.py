"""Settings of glibc's ``malloc``."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
MAX_MMAP_THRESHOLD = 32 * 2**20  # bytes; malloc accepts no higher value


def disable_malloc_trim() -> bool:
    """Make ``malloc`` keep freed blocks of up to 32 MiB instead of returning them to the kernel.

    A training step on a CPU frees its activations, and the next step allocates the same amount. Memory that was
    returned to the kernel must be mapped and zeroed again: 50,000 pages per step of ViT-B with batch size 8. Larger
    blocks are still mapped one by one, because keeping them would fragment the heap.

    Does nothing if the environment variables ``MALLOC_*`` or ``GLIBC_TUNABLES`` configure ``malloc``.

    Returns:
        Whether freed memory is kept; False without glibc.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    if configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Return freed memory to the kernel, after a step that needed much more than the following ones."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
