"""The guard of recorded models until they are allocated or filled. See ``[Note: module states]``.

A recorded model has no memory: it cannot run or be saved. What is loaded into it is kept, and read when its memory is
allocated, as a checkpoint would be; torch alone would answer "all keys matched" and lose it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints.mapping.in_memory import StateDictReader
from fabric_init.checkpoints.state_dicts import EXTRA_STATE
from fabric_init.errors import FabricInitError, RecordingError, UninitializedTensorError
from fabric_init.guard.apply import GuardedApply
from fabric_init.guard.sentinels import are_exact_sentinels, place_sentinels, sentinel_elements, version_of
from fabric_init.guard.state import BUILT
from fabric_init.planning.extra_state import takes_extra_state
from fabric_init.planning.tensors import named_modules
from fabric_init.recording.storage_tags import recorded

_ATTRIBUTE = "_fabric_init_recorded"


class _RecordedState:
    """The state of a recorded module until it has memory."""

    __slots__ = ("emptied", "extra_loaded", "fix", "loaded", "seen")

    def __init__(self, fix: str, seen: dict[int, tuple[Tensor, int]]) -> None:
        self.fix = fix
        self.seen = seen  # the model's tensors when the block ended, by identity, with their versions
        self.emptied: set[str] = set()  # those that to_empty has given memory
        self.loaded: dict[str, tuple[Tensor, int]] = {}  # what load_state_dict has brought since, with versions
        self.extra_loaded = False  # torch has set the extra state that came with it

    def written(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` was written in place since, or is new."""
        was = self.seen.get(id(tensor))
        return was is None or was[1] != version_of(tensor)

    def refuse(self, module: nn.Module, use: str) -> NoReturn:
        name = type(module).__name__
        raise UninitializedTensorError(f"{name} cannot {use}: it was recorded, and has no memory. {self.fix}.")

    def __deepcopy__(self, memo: Any) -> _RecordedState:
        raise RecordingError(f"a recorded model cannot be copied: copy it once it has values. {self.fix}.")

    def __reduce__(self) -> NoReturn:
        raise UninitializedTensorError(f"a recorded model cannot be pickled: it has no memory. {self.fix}.")


def guard_recorded(model: nn.Module, fix: str) -> None:
    """Make ``model`` raise when it is run, saved or copied, and keep what is loaded into it.

    Args:
        model: The recorded model.
        fix: What the user has to do, for messages.
    """
    seen: dict[int, tuple[Tensor, int]] = {}
    for module in model.modules():
        record = vars(module).get(_ATTRIBUTE)
        if record is not None:
            record.fix = fix
            hooks: Any = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _before_forward]:
                hooks.move_to_end(key, last=False)  # sharding has put hooks before it that gather
            continue
        if module is not model and not (module._modules or _own(module) or takes_extra_state(module)):
            continue  # nothing to guard; an activation function may be one object for all models of a library
        vars(module)[_ATTRIBUTE] = _RecordedState(fix, seen)
        vars(module)["_apply"] = partial(_apply, weakref.ref(module))
        with DisableTorchFunction():
            for tensor in _own(module).values():
                seen[id(tensor)] = tensor, version_of(tensor)
        module.register_forward_pre_hook(_before_forward)
        module.register_state_dict_pre_hook(_before_state_dict)
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)


def fix_of(module: nn.Module) -> str | None:
    """Return what the user has to do with a recorded ``module``; ``None`` if it is not recorded."""
    record = vars(module).get(_ATTRIBUTE)
    return None if record is None else record.fix


def _own(module: nn.Module) -> dict[str, Tensor]:
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def release_recorded(model: nn.Module) -> None:
    """Remove the guard of :func:`guard_recorded`."""
    for module in model.modules():
        if vars(module).pop(_ATTRIBUTE, None) is not None:
            del vars(module)["_apply"]
            if BUILT in vars(module):
                vars(module)["_apply"] = GuardedApply(module)
            tables: tuple[Any, ...] = (
                module._forward_pre_hooks,
                module._state_dict_pre_hooks,
                module._load_state_dict_pre_hooks,
                module._load_state_dict_post_hooks,
            )
            for table in tables:
                for key in [key for key, hook in table.items() if getattr(hook, "hook", hook) in _HOOKS]:
                    del table[key]


def guards_in_copy(model: nn.Module) -> dict[int, object]:
    """Return a memo for :func:`copy.deepcopy` with which a recorded ``model`` can be copied.

    The caller fills the copy's tensors and removes its guard with :func:`release_recorded`.
    """
    return {id(record): _RecordedState(record.fix, {}) for _, _, record in _records(model) if record is not None}


def _of(module: nn.Module) -> _RecordedState:
    state: _RecordedState = vars(module)[_ATTRIBUTE]
    return state


def _apply(itself: weakref.ref[nn.Module], fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace ``Module._apply``, which ``to``, ``share_memory`` and ``to_empty`` call.

    A cast is allowed. Memory that ``to_empty`` allocates has to be written by the user.
    """
    module = itself()
    assert module is not None
    own = [name for name, tensor in _own(module).items() if recorded(tensor) is not None]
    if own:
        try:
            fn(torch.empty(0, device="meta"))
        except (NotImplementedError, RuntimeError):
            _of(module).refuse(module, "be moved or shared")
    if BUILT in vars(module):  # an earlier block has built it, and left tensors uninitialized
        GuardedApply(module)(fn, recurse)
    else:
        type(module)._apply(module, fn, recurse)
    for name in own:
        tensor = getattr(module, name)
        if not tensor.is_meta:
            with torch.no_grad():
                place_sentinels(tensor)
            _of(module).emptied.add(name)
    return module


def _before_forward(module: nn.Module, args: Any) -> None:
    _of(module).refuse(module, "run")


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    _of(module).refuse(module, "be saved")


def _before_load(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
    fix, kept = _of(module).fix, _of(module).loaded
    _of(module).extra_loaded |= prefix + EXTRA_STATE in state_dict
    for name, tensor in _own(module).items():
        value = state_dict.get(prefix + name)
        if not tensor.is_meta or not isinstance(value, Tensor) or value.shape != tensor.shape:
            continue  # torch itself loads what has memory, and says what does not fit
        kept.pop(name, None)
        if local_metadata.get("assign_to_params_buffers"):
            continue
        if isinstance(value, DTensor):
            raise FabricInitError(f"{prefix}{name}: shards cannot be loaded before the model is sharded. {fix}.")
        if value.is_meta:
            raise UninitializedTensorError(f"{prefix}{name} has no values in the state dict: its model had no memory.")
        kept[name] = value.detach(), version_of(value)
        state_dict[prefix + name] = value.detach().to("meta")  # in this call's own copy: checks, no warning


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    record = _of(module)
    for name in record.loaded:
        if (tensor := _own(module).get(name)) is not None and tensor.is_meta:
            record.seen[id(tensor)] = tensor, version_of(tensor)  # torch has counted its copy


_HOOKS = (_before_forward, _before_state_dict, _before_load, _after_load)


def _records(model: nn.Module) -> Iterator[tuple[str, nn.Module, _RecordedState | None]]:
    for prefix, module in named_modules(model):
        yield f"{prefix}." if prefix else "", module, vars(module).get(_ATTRIBUTE)


def refuse_lost_writes(model: nn.Module) -> None:
    """Raise if recorded tensors were written in place after their block, when there was no memory to write to.

    Raises:
        RecordingError: Some were; the message names them.
        UninitializedTensorError: ``to_empty`` has allocated memory that has not been written.
    """
    garbage = [
        prefix + name
        for prefix, module, record in _records(model)
        if record is not None
        for name in record.emptied
        if (tensor := _own(module).get(name)) is not None and not tensor.is_meta
        if (samples := sentinel_elements(tensor)) is not None and are_exact_sentinels(samples)
    ]
    if garbage:
        raise UninitializedTensorError(
            f"{', '.join(garbage[:5])}{' …' if len(garbage) > 5 else ''}: to_empty() has allocated memory, and "
            "nothing has written values there. Leave to_empty() out: recorded tensors get memory and values together."
        )
    lost = [
        prefix + name
        for prefix, module, record in _records(model)
        if record is not None
        for name, tensor in _own(module).items()
        if tensor.is_meta and id(tensor) in record.seen and record.written(tensor)
    ]
    if lost:
        raise RecordingError(
            f"{', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}: written or cast after the recorded block, when "
            "there was no memory to write to. Do it in the block, where it is recorded, or once the model has values."
        )


def replaced_since_block(model: nn.Module) -> set[str]:
    """Return the names of tensors with memory that the user has put into ``model``, or written, since its block."""
    return {
        prefix + name
        for prefix, module, record in _records(model)
        for name, tensor in _own(module).items()
        if not tensor.is_meta and (record is None or record.written(tensor))
    }


def loaded_since(model: nn.Module) -> StateDictReader | None:
    """Return what ``load_state_dict`` has brought for the recorded ``model``, as a checkpoint; ``None`` for nothing.

    Raises:
        RecordingError: A loaded tensor was written since, so that its values are lost.
    """
    loaded = {
        prefix + name: value
        for prefix, module, record in _records(model)
        if record is not None
        for name, value in record.loaded.items()
        if (now := _own(module).get(name)) is not None and now.is_meta
    }
    changed = [name for name, (tensor, version) in loaded.items() if version_of(tensor) != version]
    if changed:
        raise RecordingError(
            f"{', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}: what load_state_dict was given was written "
            "before the model got memory, which is when it is read. Load copies (tensor.clone()), or load once the "
            "model has values."
        )
    return StateDictReader({name: tensor for name, (tensor, _) in loaded.items()}) if loaded else None


def overrule_loads(model: nn.Module, names: Collection[str], with_extra_state: Collection[nn.Module]) -> None:
    """Discard what ``load_state_dict`` has brought for tensors and modules whose load was declared since."""
    for prefix, module, record in _records(model):
        if record is not None:
            for name in [name for name in record.loaded if prefix + name in names]:
                del record.loaded[name]
            record.extra_loaded = record.extra_loaded and module not in with_extra_state


def wants_extra_state(module: nn.Module) -> bool:
    """Return whether the extra state of ``module`` last came from a declared checkpoint."""
    record: _RecordedState | None = vars(module).get(_ATTRIBUTE)
    return record is None or not record.extra_loaded
