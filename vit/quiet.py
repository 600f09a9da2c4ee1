"""Libraries below Python that talk to the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Native code (libtiff) writes warnings straight to descriptor 2; only what Python says is for the user."""
    try:
        if sys.stderr.fileno() != 2:
            raise OSError
        keep = os.dup(2)
    except (OSError, AttributeError, ValueError):  # no real standard error
        yield
        return
    sys.stderr.flush()
    before, nowhere = sys.stderr, os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    sys.stderr = open(keep, "w", encoding=before.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        yield
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        sys.stderr = before
        os.dup2(keep, 2)
        os.close(keep)
