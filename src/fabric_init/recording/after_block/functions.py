"""Functions of torch that have an answer of their own for recorded tensors after the block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchFunction, asks_if_view
from fabric_init.recording.in_block import device_queries, from_python, memory_access
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become_recorded, recorded


def _set_data(later: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``p.data = t``, which takes values, or the wait for some, from ``t``."""
    target, value = args
    with DisableTorchFunction(), torch.no_grad():
        old, new = recorded(target), recorded(value)
        if isinstance(value, RecordedTensor) and new is not None:
            if isinstance(target, RecordedTensor):
                func(target, value)
                target._meta, target._claimed = value._meta.detach(), value._claimed
                if old is not None:
                    later.waiting.rename(old.storage, new.storage)
            else:
                become_recorded(target, value._meta.detach(), value._claimed)
        elif isinstance(target, RecordedTensor):
            later.replace(target, value.detach())
        else:
            func(target, value)


def _is_view(later: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What torch.export and torch.compile ask before they make a fake tensor from one: it needs to be a plain one."""
    later.value(args[0], "be traced")
    later.make_plain(args[0])
    return bool(func(args[0]))


_ASKS_FOR_VALUES = frozenset({"mesh_scatter", "mesh_broadcast", "reset_sharded_param"})


def _is_meta(later: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """``t.is_meta``, by which ``distribute_tensor`` and ``fully_shard`` ask whether a tensor has values.

    There is nothing to send to other ranks yet, and no need to: every rank has recorded the whole tensor, and takes its
    part of that. And a shard without values need not be padded again when a state dict was loaded.
    """
    asking = sys._getframe(4)
    if not asks_for_values(asking):
        return bool(func(args[0]))
    parts = asking.f_locals["scatter_list"] if asking.f_code.co_name == "mesh_scatter" else args[:1]
    if all(map(later.has_value, parts)):  # parts without elements always have one, and all ranks have to say the same
        return bool(func(args[0]))
    take_own_part(asking, args[0], later.has_value)
    return True


def _chunk(later: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.chunk``, by which ``fully_shard`` cuts each parameter into one piece a rank, to look at two of them.

    Among 256 ranks, recorded tensors for all the others take ten times as long as the rest of sharding. It asks the
    pieces for their shapes, and copies one into a recorded tensor: for that, plain meta tensors on the storage will do.
    """
    asking = sys._getframe(4)
    if asking.f_code.co_name == "_chunk_with_empty" and str(asking.f_globals.get("__name__")).startswith(_FSDP2):
        with DisableTorchFunction(), torch.no_grad():
            found = recorded(args[0])
            if isinstance(args[0], RecordedTensor) and found is not None and later.waiting.missing([found.storage]):
                _note_unit(later, found.storage, asking)
                return func(args[0]._meta, *args[1:], **kwargs)
    return func(*args, **kwargs)


def _note_unit(later: Any, storage: int, frame: FrameType | None) -> None:
    """Tell the models with ``storage`` for which module ``fully_shard``, which has called this frame, gathers it."""
    while frame is not None and "modules" not in frame.f_locals:
        frame = frame.f_back
    if frame is None:
        return
    for owners in later.owners:
        if owners.has(later.waiting.origin(storage)):
            owners.gathered_for(frame.f_locals["modules"][0])


_FSDP2 = "torch.distributed.fsdp._fully_shard."


def asks_for_values(asking: FrameType) -> bool:
    """Return whether the code in this frame asks ``t.is_meta`` to know whether there are values to be sent around."""
    name = str(asking.f_globals.get("__name__"))
    return asking.f_code.co_name in _ASKS_FOR_VALUES and name.startswith("torch.distributed.")


def take_own_part(asking: FrameType, output: Tensor, is_there: Callable[[Tensor], bool]) -> None:
    """Copy this rank's part to ``output``, if the code in this frame is about to get it from another rank."""
    given = asking.f_locals
    if asking.f_code.co_name == "mesh_scatter":
        part = given["scatter_list"][given["mesh"].get_local_rank(given["mesh_dim"])]
        if not is_there(part):
            output.copy_(part)


HANDLERS: dict[Any, Any] = {
    **device_queries.LATER_HANDLERS,
    **from_python.HANDLERS,
    **memory_access.HANDLERS,
    asks_if_view: _is_view,
    torch.chunk: _chunk,
    Tensor.is_meta.__get__: _is_meta,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
"""By function: what to call with the :class:`~fabric_init.recording.after_block.dispatch.AfterBlock` of a tape."""
