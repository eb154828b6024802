"""Quantize weights while they are filled: parameters whose library packs them when they are moved to a device.

[Note: quantized while filling]
bitsandbytes builds float parameters, which ``load_state_dict`` fills, and quantizes them in ``parameter.to(device)``.
So a load is planned for the float weights, and then each such parameter is moved, while it is recorded: the packed
weight, its scales and whatever else the library makes are computed on the tape from the float one, which the model no
longer holds. From then on it is as if it had been moved in the block, see [Note: made of plain tensors].
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import FabricInitError
from fabric_init.filling.values.loads_noted import loads_noted
from fabric_init.planning.placement import Placement
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.recorded_load.key_tensors import recorded_on_sources
from fabric_init.planning.tensors import TensorInfo, Walk, Walked, find_tensors, named_modules
from fabric_init.recording.tape.tape import Rng
from fabric_init.recording.tensor.geometry import follow_meta
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, meta_of, recorded
from fabric_init.recording.tensor.storage_tags import StorageTag, ref_of
from fabric_init.sharding.packed_weights import is_packed


def packed(prepared: PreparedPlan, walk: Walk, placement: Placement) -> PreparedPlan:
    """Pack the weights that their library quantizes on their device, on the tape, and return how to undo that as well.

    Args:
        prepared: The plan for the weights as they are before that.
        walk: Over the recorded model, whose parameters are packed by this call.
        placement: How this rank keeps the tensors.

    Raises:
        FabricInitError: A weight was sharded before it was quantized, or was not recorded.
    """
    if _layers() is None:
        return prepared
    _refuse_lost(walk)
    waiting = [(info, tensor) for info, tensor in find_tensors(walk) if _quantizes_when_moved(info, tensor)]
    if not waiting:
        return prepared
    undo = _remember(walk, [tensor for _, tensor in waiting])

    def undo_all() -> None:
        undo()
        if prepared.undo is not None:
            prepared.undo()

    try:
        with loads_noted(prepared), recorded_on_sources(_rng(prepared)) as mode:
            mode.tape.shares_seed = True
            for info, tensor in waiting:
                was = mode.recorder.lookup(tensor)
                tensor.to(placement.device(info))
                _let_wait(tensor, was, info.name, walk.model)
    except BaseException:
        undo()
        raise
    return prepared._replace(tapes={storage: tape.current() for storage, tape in prepared.tapes.items()}, undo=undo_all)


def _let_wait(tensor: Tensor, was: StorageTag | None, name: str, model: nn.Module) -> None:
    """Let a packed weight wait in the place of the one that it is computed from, as if it had been there at first."""
    with DisableTorchFunction():
        found = recorded(tensor)
    if found is None or was is None or found.storage == was.storage:
        return
    waiting = found.tape.after_block.waiting
    if was.storage in found.tape.waits:
        waiting.begin(found.storage, type(model).__name__, name, ref_of(meta_of(tensor), found.storage))
        waiting.rename(was.storage, found.storage)


def _quantizes_when_moved(info: TensorInfo, tensor: Tensor) -> bool:
    """Return whether a recorded parameter is one of bitsandbytes that ``.to(device)`` would quantize."""
    layers = _layers()
    if layers is None or info.real or not info.dtype.is_floating_point or not isinstance(tensor, RecordedTensor):
        return False
    if isinstance(tensor, layers.Params4bit):
        return not tensor.bnb_quantized
    return isinstance(tensor, layers.Int8Params) and not tensor.has_fp16_weights


def _refuse_lost(walk: Walk) -> None:
    """Raise if a layer of bitsandbytes has a float weight that it could not quantize any more."""
    for name, module in walk.named:
        kind = _kind_of_weight(module)
        if kind is None:
            continue
        weight: Any = module.weight
        with DisableTorchFunction():
            found = recorded(weight)
        layer = f"{name or 'the model'} ({type(module).__name__})"
        if found is None and weight.is_meta and weight.is_floating_point():
            raise FabricInitError(
                f"{layer} was built on the meta device by name, so nothing of it was recorded, and bitsandbytes would "
                "not quantize it. Build it in the recorded block without a device, or on the one that you use. "
                "transformers' from_pretrained(…, quantization_config=…) fills such layers by itself."
            )
        if found is not None and not is_packed(weight) and not isinstance(weight, kind) and weight.is_floating_point():
            raise FabricInitError(
                f"the weight of {layer} was sharded, or replaced, before it was quantized, which bitsandbytes cannot "
                'do afterwards. Quantize first, in the recorded block: model.to("cpu"), or the device that you use; '
                "then shard, then fill."
            )


def _kind_of_weight(module: nn.Module) -> type[Tensor] | None:
    """Return the class of parameters that a layer of bitsandbytes quantizes; ``None`` for any other module."""
    layers = _layers()
    if layers is not None and isinstance(module, (layers.Linear4bit, layers.Embedding4bit)):
        return layers.Params4bit  # type: ignore[no-any-return]
    if layers is not None and isinstance(module, layers.Linear8bitLt) and not module.state.has_fp16_weights:
        return layers.Int8Params  # type: ignore[no-any-return]
    return None


def _layers() -> Any:
    """Return ``bitsandbytes.nn``, if the user has imported it."""
    return getattr(sys.modules.get("bitsandbytes"), "nn", None)


def refuse_own_hooks(model: Walked, reader: CheckpointReader | None) -> None:
    """Raise for Lightning's layers: a hook of theirs quantizes on CUDA whatever a state dict brings, on every device.

    Raises:
        FabricInitError: There are some.
    """
    for name, module in named_modules(model) if reader is not None and _layers() is not None else ():
        for hook in module._load_state_dict_pre_hooks.values():
            function = getattr(getattr(hook, "hook", hook), "func", None)  # torch keeps a pre-hook in a wrapper
            if str(getattr(function, "__module__", "")).endswith("fabric.plugins.precision.bitsandbytes"):
                raise FabricInitError(
                    f"{name or 'the model'} is a layer of Lightning's BitsandbytesPrecision, which quantizes on CUDA "
                    "whatever it loads, while it loads: that cannot be recorded. Fill the model with its own layers, "
                    "and convert it afterwards: precision.convert_module(model). Or build bitsandbytes.nn.Linear4bit."
                )


def _rng(prepared: PreparedPlan) -> Rng:
    return "eager" if {tape.rng for tape in prepared.tapes.values()} == {"eager"} else "per_op"


def _remember(walk: Walk, tensors: list[Tensor]) -> Callable[[], None]:
    """Return what makes the parameters, and the modules that they are in, what they are now."""
    ids = {id(tensor) for tensor in tensors}
    holders = {
        id(module): module
        for _, module in walk.once
        if any(id(tensor) in ids for tensor in module._parameters.values())
    }
    kept = [(vars(module), dict(vars(module))) for module in holders.values()]
    states = [(tensor, tensor._meta, tensor._claimed, dict(vars(tensor))) for tensor in tensors]  # type: ignore[attr-defined]

    def undo() -> None:
        with DisableTorchFunction(), DisableTorchDispatch(), torch.no_grad():
            for tensor, meta, device, attributes in states:
                if not isinstance(tensor, RecordedTensor):
                    continue  # it has its values
                tensor._meta, tensor._claimed = meta, device
                follow_meta(tensor)
                for name in vars(tensor).keys() - attributes.keys():
                    delattr(tensor, name)
                for name, value in attributes.items():
                    setattr(tensor, name, value)
        for now, contents in kept:
            now.clear()
            now.update(contents)

    return undo
