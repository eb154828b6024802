"""Explain an out-of-memory error during a fill: how much was filled, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from fabric_init.errors import FabricInitError, OutOfMemoryError, is_out_of_memory
from fabric_init.planning.plan import Plan


@contextmanager
def out_of_memory_explained(plan: Plan, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Return a context that explains out-of-memory errors while ``values`` are gathered, by position in ``plan``.

    Raises:
        OutOfMemoryError: Memory has run out; the model has not changed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FabricInitError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        held = sum(value.nbytes for value in values.values())
        raise OutOfMemoryError(
            f"out of memory after {len(values)} of {len(plan.entries)} tensors ({held:,} bytes): {reason}. The model "
            "is as it was. Shard it (FSDP2, ZeRO-3), build it in fewer bits (precision), or leave files mapped (mmap)."
        ) from error
