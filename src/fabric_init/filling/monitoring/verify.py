"""A debug switch: after a fill, read every loaded tensor again and compare it with what the model holds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import FabricInitError
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Plan
from fabric_init.planning.rank_loads import loads, read_as
from fabric_init.recording.tensor.wrappers import is_wrapper
from fabric_init.sharding.dtensor import local

VARIABLE = "FABRIC_INIT_VERIFY"
"""The environment variable that turns it on, as ``1``. Every rank then reads its parts twice."""


def is_wanted() -> bool:
    """Return whether fills are to be verified."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def verify(plan: Plan, tensors: Sequence[Tensor], reader: CheckpointReader, placement: Placement) -> None:
    """Compare what this rank holds of each loaded tensor with the checkpoint. torch's modes must be off.

    Args:
        plan: What was executed.
        tensors: What the model holds now, for each entry of the plan.
        reader: The checkpoint.
        placement: How this rank keeps the tensors.

    Raises:
        FabricInitError: Some differ; the message names them.
    """
    wrong = []
    for load in loads(plan, placement):
        if is_wrapper(local(tensors[load.position])):
            continue  # holds what was made of the values in the file
        slot = load.entry.slot
        value = read_as(reader, load.entry.keys[0], slot.shape, load.region).to(slot.dtype)
        held = _held(tensors[load.position]).detach().to("cpu")
        if held.numel() != value.numel():  # a part of ZeRO-3 is padded
            held = held.reshape(-1)[: value.numel()].reshape(value.shape)
        if not torch.equal(_bytes(held.to(value.dtype)), _bytes(value)):
            wrong.append(slot.name)
    if wrong:
        raise FabricInitError(
            f"{len(wrong)} loaded tensors do not have the values of {reader.path}, which is a bug of fabric_init: "
            f"{', '.join(wrong[:20])}{' …' if len(wrong) > 20 else ''}"
        )


def _held(tensor: Tensor) -> Tensor:
    part: Tensor | None = getattr(tensor, "ds_tensor", None)  # this rank's part of a ZeRO-3 parameter
    return local(tensor) if part is None else part


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: NaN is the same as NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
