"""Traces that are made to be looked at."""

import contextlib
import gc


@contextlib.contextmanager
def forgotten():
    """A graph made inside is garbage in cycles: collect it, so that the step's has its memory."""
    # What was there before need not be looked through, which takes long in a large process.
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if ours:
            gc.unfreeze()
