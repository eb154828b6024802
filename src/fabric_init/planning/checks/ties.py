"""Tied tensors in a checkpoint: a tensor that several keys bring must have one value under all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.plan import PlanEntry


def check_tie(path: AnyPath, entry: PlanEntry, key: str, value: Tensor, other: Tensor) -> None:
    """Check that a tied tensor has the same value under its first key (``value``) and under ``key`` (``other``).

    Raises:
        CheckpointMismatchError: It has not.
    """
    if not torch.allclose(value, other, rtol=0, atol=0, equal_nan=True):
        raise CheckpointMismatchError(
            f"{path}: {entry.keys[0]} and {key} hold different values, but in the model they are one tied tensor "
            f"({' = '.join(entry.slot.names)}). Build the model untied, or drop one key with rename."
        )


def check_values(path: AnyPath, entry: PlanEntry, values: Iterator[Tensor]) -> None:
    """Check that a tied tensor has the same value under all of its keys: ``values``, in their order.

    Raises:
        CheckpointMismatchError: It has not.
    """
    first = next(values)
    for key, value in zip(entry.keys[1:], values, strict=True):
        check_tie(path, entry, key, first, value)
