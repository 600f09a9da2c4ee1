"""Let the C library keep memory that PyTorch frees, for the next pass over the model."""

import ctypes
import os
import sys

# glibc's names and numbers (malloc.h), and the largest that both take.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LIMIT = 2**30


def keep_freed_memory() -> bool:
    """Ask glibc not to hand freed memory back to the system; whether that is done from now on, in this process.

    A pass over a model takes and frees the same hundreds of megabytes again and again. By itself glibc returns them
    each time, and the system has to map and clear every page anew: up to a third of the time of a prediction on a CPU.
    The price is that a process stays as large as it once was. The scripts ask for this; a program of your own may, too.
    Nothing happens where there is another C library, or the environment says ``MALLOC_...`` or ``GLIBC_TUNABLES``.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_THRESHOLD, LIMIT) or mallopt(MMAP_THRESHOLD, 2**25)) and bool(
        mallopt(TRIM_THRESHOLD, 2 * LIMIT - 1)
    )
