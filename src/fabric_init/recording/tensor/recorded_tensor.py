"""A recorded tensor: one that has no memory until it has values, and that answers for itself wherever it is kept.

[Note: recorded tensors]
A recorded tensor is an instance of a ``torch.Tensor`` subclass whose storage is on the meta device, made as torch's
FakeTensor is (``_make_subclass`` with the dispatch keys of the device that it claims). So it passes
``isinstance(p, nn.Parameter)``, reports the device that its constructor asked for, and every operator that reaches it
comes to ``__torch_dispatch__`` below: in a block or after it, from a module, a closure, a cache or an optimizer, with
hooks or without. Plain meta tensors do not have that property: ``matmul``, ``conv``, ``index`` and others of torch 2.13
take a meta operand beside a real one and return memory that nobody has written.

Each has a plain meta tensor beside it, ``_meta``, on the same storage and of the same geometry: meta kernels run on
that one, and the recording is attached to that storage (see ``meta_twin.py``). When values come, the Python object
stays and becomes a plain tensor (:func:`become`), so optimizers and ties hold.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import (
    DisableTorchDispatch,
    DisableTorchFunction,
    DisableTorchFunctionSubclass,
    make_subclass,
    swap_tensor_impl,
    use_count,
)
from fabric_init.errors import RecordingError
from fabric_init.recording.replay.tracing import OutsideTracing, never_compiled
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.meta_twin import MetaTwin
from fabric_init.recording.tensor.recorded_storage import typed_storage
from fabric_init.recording.tensor.storage_tags import StorageTag, begin_unmarked, recorded_storage, ref_of

META = torch.device("meta")
ASKS_DEVICE = torch.ops.prim.device.default
"""How torch's own code asks a tensor that answers by itself for its device."""


_NEW_PARAMETER = nn.Parameter.__new__.__code__
_OWN_ATTRIBUTES = frozenset({"_twin", "_is_param", "_held"})
_attributes = vars(Tensor)["__dict__"].__get__
"""Returns all attributes of a tensor, those of ours as well."""
_set_attributes = vars(Tensor)["__dict__"].__set__

_NOTHING = nullcontext()
_MAKES_SUBCLASS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class RecordedTensor(Tensor):
    """A tensor that was recorded and has no values yet. Made by :func:`make_recorded_tensor`."""

    _twin: MetaTwin
    _held: Tensor
    """A copy of the values for code that knows where they are."""

    def __new__(cls, data: Tensor, requires_grad: bool = True, **attributes: Any) -> Any:
        """Return a parameter: code that wants one like another calls ``type(p)(data, requires_grad, **p.__dict__)``."""
        parameter = getattr(cls, "own_class", nn.Parameter)(data, requires_grad)
        for name, value in attributes.items():
            setattr(parameter, name, value)
        return parameter

    @property
    def __dict__(self) -> dict[str, Any]:
        """What the model's code has put on the tensor: other code makes parameters with ``cls(t, **p.__dict__)``."""
        every: dict[str, Any] = _attributes(self)
        if sys._getframe(1).f_code.co_name == "swap_attr":  # of torch.utils.swap_tensors
            return every
        return {name: value for name, value in every.items() if name not in _OWN_ATTRIBUTES}

    @__dict__.setter
    def __dict__(self, attributes: dict[str, Any]) -> None:
        _set_attributes(self, attributes)

    @property
    def _meta(self) -> Tensor:
        return self._twin.meta

    @_meta.setter
    def _meta(self, meta: Tensor) -> None:
        self._twin = MetaTwin(meta, self._twin.device)

    @property
    def _claimed(self) -> torch.device:
        return self._twin.device

    @_claimed.setter
    def _claimed(self, device: torch.device) -> None:
        self._twin = MetaTwin(self._twin.meta, device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the tensor is meant for."""
        return self._twin.device

    # -- what a block asks of each parameter: answered here, since torch's modes cost more than the answers ------------

    def detach(self) -> Tensor:
        """Return another recorded tensor at the same place: ``nn.Parameter`` asks each tensor for it first."""
        if not _later(self).block_is_open:
            return super().detach()
        with DisableTorchFunction():
            if super().grad_fn is not None:
                return super().detach()
            with DisableTorchDispatch():
                detached = _at(self._twin)
        asking = sys._getframe(1)
        if asking.f_code is _NEW_PARAMETER and (own := asking.f_locals["cls"]) is not nn.Parameter:
            self.__class__ = detached.__class__ = recorded_class(own)  # type: ignore[assignment]  # torch wants both to be of one class
        elif not issubclass(getattr(type(self), "own_class", nn.Parameter), nn.Parameter):
            detached.__class__ = type(self)  # as torch lets results be of the class of what they are computed from
        return detached

    def as_subclass(self, cls: type[Tensor]) -> Tensor:  # type: ignore[override]
        """Ask from here, where :func:`_in_class_of` finds no other class than ``cls``."""
        return super().as_subclass(cls)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """What ``nn.Parameter`` asks next."""
        if not _later(self).block_is_open:
            return super().requires_grad_(requires_grad)
        with DisableTorchFunction():
            return super().requires_grad_(requires_grad)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """What a module asks a tensor that it registers."""
        if not _later(self).block_is_open:
            return super().grad_fn
        with DisableTorchFunction():
            return super().grad_fn

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage, which answers for itself as well from now on."""
        _ = self._twin.meta
        return super().untyped_storage()

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """What torch makes of this may come to operators with the storage of a source alone, which has to be known."""
        for source in (*args, *kwargs.values()):
            _ = meta_of(source)
        return super().set_(*args, **kwargs)

    def _typed_storage(self) -> torch.TypedStorage:
        storage: torch.TypedStorage = typed_storage(super()._typed_storage())  # type: ignore[no-untyped-call]
        return storage

    @classmethod
    @never_compiled
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not all(
            issubclass(each, Tensor) for each in types
        ):  # a lazy tensor, say, which loads itself when it is used
            return NotImplemented
        tensor = first_recorded((args, (kwargs or {}).values()))
        if tensor is None:  # a question about the class
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _later(tensor).function(func, args, kwargs or {})

    @classmethod
    @never_compiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is ASKS_DEVICE:
            return args[0]._claimed
        tensor = first_recorded((args, (kwargs or {}).values()))
        assert tensor is not None
        later = _later(tensor)
        if later.block_is_open and func in _MAKES_SUBCLASS:
            return _in_class_of(sys._getframe(2), tensor)
        return later.dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text: str = _later(self).text(self)
        return f"Parameter containing:\n{text}" if isinstance(self, nn.Parameter) else text

    def __reduce_ex__(self, protocol: Any) -> Any:
        real: Tensor = _later(self).look_at(self, "be pickled")
        if isinstance(self, nn.Parameter):
            real = nn.Parameter(real, self.requires_grad)
        return real.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _later(self).copy(self, memo)
        copied: Tensor = memo[id(self)]
        return copied


class FormerTensor(RecordedTensor):
    """What a recorded tensor was before it became a plain one: torch may hold it in a call, or in autograd's graph."""


def make_recorded_tensor(meta: Tensor, device: torch.device, requires_grad: bool = False) -> RecordedTensor:
    """Return a recorded tensor on the storage of ``meta``, of its geometry, that claims to be on ``device``."""
    return _at(MetaTwin(meta, device), requires_grad)


def new_tensor(meta: Tensor, tape: Tape, device: torch.device, requires_grad: bool = False) -> RecordedTensor:
    """Return a recorded tensor on the storage of ``meta``, all of it, which is recorded on ``tape`` from now on."""
    return _at(MetaTwin(meta, device, begin_unmarked(meta, meta.nbytes, tape, device)), requires_grad)


def _at(twin: MetaTwin, requires_grad: bool = False) -> RecordedTensor:
    tensor: RecordedTensor = make_subclass(
        RecordedTensor, twin.unmarked, requires_grad, dispatch_device=True, device_for_backend_keys=twin.device
    )
    tensor._twin = twin
    return tensor


def whole_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """Return a flat plain meta tensor of ``dtype`` over all of a recorded storage. torch's modes must be off."""
    return torch.empty(0, dtype=dtype, device=META).set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def meta_of(tensor: Tensor) -> Tensor:
    """Return the plain meta tensor beside a recorded one; any other tensor as it is."""
    return tensor._meta if isinstance(tensor, RecordedTensor) else tensor


def recorded(tensor: Tensor) -> StorageTag | None:
    """Return the recording behind ``tensor``, or ``None`` for any other tensor, real or meta."""
    return tensor._twin.recorded if isinstance(tensor, RecordedTensor) else recorded_storage(tensor)


def recorded_ref(tensor: Tensor, storage: int) -> TensorRef:
    """Return where ``tensor``, recorded or a plain meta one, is on recorded storage number ``storage``."""
    return tensor._twin.ref if isinstance(tensor, RecordedTensor) else ref_of(tensor, storage)


def become(tensor: Tensor, value: Tensor, *, alone: bool = False) -> None:
    """Give ``tensor``, which stays the same Python object, the memory of ``value``.

    Other recorded tensors on the storage of a recorded one will find their values there, too, unless it is ``alone``.

    ``torch.utils.swap_tensors`` would do, but for three things: it also swaps the objects' attributes, drops hooks,
    and refuses tensors that something holds a weak reference to. The swap under it has none of these troubles.
    """
    is_leaf, requires_grad, is_parameter = tensor.is_leaf, tensor.requires_grad, isinstance(tensor, nn.Parameter)
    hooks = tensor._backward_hooks if is_leaf else None
    after_accumulation = tensor._post_accumulate_grad_hooks if is_leaf else None
    grad = tensor.grad if is_leaf else None
    requires_grad = requires_grad and is_leaf
    outside_inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING
    with OutsideTracing(), DisableTorchDispatch(), DisableTorchFunction(), outside_inference:
        other: Tensor = nn.Parameter(value, requires_grad=False) if is_parameter else value.detach()
        other.requires_grad_(requires_grad)
        swap_tensor_impl(tensor, other)
        if requires_grad and use_count(other) > 1 and not value.is_meta:  # what was computed before has it as its leaf
            other.register_post_accumulate_grad_hook(partial(_pass_grad_on, weakref.ref(tensor)))
    if isinstance(tensor, RecordedTensor):
        if not alone and not value.is_meta:
            _note_memory(tensor, value)
        other.__class__ = FormerTensor
        _attributes(other)["_twin"] = tensor._twin
        plain = nn.Parameter if is_parameter else Tensor
        tensor.__class__ = getattr(type(tensor), "own_class", plain)  # type: ignore[arg-type]
        for name in _OWN_ATTRIBUTES:  # last: another thread may be asking
            _attributes(tensor).pop(name, None)
        if is_parameter and not issubclass(type(tensor), nn.Parameter):
            tensor._is_param = True  # as nn.Parameter does for tensors of other classes
    if grad is not None and grad.size() == tensor.size():
        tensor.grad = _with_values(grad)
    if hooks:
        tensor._backward_hooks = hooks
    if after_accumulation:
        tensor._post_accumulate_grad_hooks = after_accumulation


def _with_values(grad: Tensor) -> Tensor:
    """Return a gradient that a constructor has set as a plain tensor, if its values can be had: autograd holds it."""
    with DisableTorchFunction():
        if not isinstance(grad, RecordedTensor) or not _later(grad).has_value(grad):
            return grad
        plain: Tensor = _later(grad).value(grad, "be read")
    return plain


def _pass_grad_on(reference: weakref.ref[Tensor], before: Tensor) -> None:
    """Add what ``backward`` has left at a tensor to the one that has taken its place."""
    tensor = reference()
    with DisableTorchFunction():
        grad, before.grad = before.grad, None
    if tensor is not None and grad is not None:
        tensor.grad = grad if tensor.grad is None else tensor.grad + grad


def _in_class_of(asking: FrameType, tensor: RecordedTensor) -> Tensor:
    """Return a recorded tensor like ``tensor``, of the class that the ``asking`` code puts it into.

    A lazy one, which has no shape yet, is a plain meta tensor, as it refuses every question.

    In a block no detach comes here but from ``torch.Tensor._make_subclass(cls, tensor)`` and ``as_subclass``, which do
    not say which class they want, and raise if what they get is not of it. So the code that calls them is looked at.
    """
    values = [*asking.f_locals.values(), *map(asking.f_globals.get, asking.f_code.co_names)]
    classes = dict.fromkeys(value for value in values if isinstance(value, type) and issubclass(value, Tensor))
    own = [value for value in classes if value not in (Tensor, nn.Parameter, RecordedTensor)]
    if len(own) != 1:
        raise RecordingError(
            f"{asking.f_code.co_filename}:{asking.f_lineno} puts a recorded tensor into a subclass of torch.Tensor in "
            "a way that cannot be recorded. Build that tensor with plain values, outside the block, or after it."
        )
    plain: Tensor = make_subclass(own[0], tensor._meta)
    if is_lazy(plain):
        _later(tensor).tape.has_plain = True
        return plain
    made = make_recorded_tensor(tensor._meta.detach(), tensor._claimed)
    made.__class__ = recorded_class(own[0])  # type: ignore[assignment]
    return made


def claim(tensor: Tensor) -> None:
    """Turn a plain meta tensor on a recorded storage into a recorded tensor, which stays the same Python object.

    In a block, ``torch.Tensor._make_subclass`` and ``as_subclass`` put plain meta tensors into classes of the model's
    own, and lazy parameters are such ones.
    """
    found = recorded_storage(tensor)
    if found is not None:
        become_recorded(tensor, tensor.detach() if type(tensor) is Tensor else _plain_view(tensor), found.device)


def give_lazy_memory(tensor: Tensor) -> None:
    """Take a lazy parameter or buffer, which has no shape yet, out of the recording.

    It gets its shape and values once the model runs or is loaded, after the block, as in plain PyTorch. torch's modes
    must be off: lazy tensors answer no question.
    """
    found = recorded_storage(tensor)
    if found is not None:
        empty = torch.empty(0, dtype=tensor.dtype, device=found.device)
        swap_tensor_impl(tensor, make_subclass(type(tensor), empty, tensor.requires_grad))


def _plain_view(tensor: Tensor) -> Tensor:
    plain = torch.empty(0, dtype=tensor.dtype, device=META)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@cache
def recorded_class(own: type[Tensor]) -> type[Tensor]:
    """Return the class of recorded tensors that will be of class ``own`` once they have values."""
    if own in (Tensor, nn.Parameter) or issubclass(own, RecordedTensor):
        return RecordedTensor
    return type(f"Recorded{own.__name__}", (RecordedTensor, own), {"own_class": own, "__module__": __name__})


def class_of(tensor: Tensor) -> type[Tensor]:
    """Return the class of ``tensor``; of a recorded one, the class that it will be of once it has values."""
    if not isinstance(tensor, RecordedTensor):
        return type(tensor)
    plain = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
    return getattr(type(tensor), "own_class", plain)


def become_recorded(tensor: Tensor, meta: Tensor, device: torch.device) -> None:
    """Turn a plain meta ``tensor``, which stays the same Python object, into a recorded one."""
    is_parameter = isinstance(tensor, nn.Parameter)
    other = make_recorded_tensor(meta, device, tensor.requires_grad)
    swap_tensor_impl(tensor, other)
    tensor.__class__ = recorded_class(type(tensor))
    _attributes(tensor)["_twin"] = other._twin
    if is_parameter:
        _attributes(tensor)["_is_param"] = True


def _note_memory(tensor: RecordedTensor, value: Tensor) -> None:
    found = recorded(tensor)
    if found is None:
        return
    ref, tape = tensor._twin.ref, found.tape
    offset = (value.storage_offset() - ref.offset) * ref.dtype.itemsize
    same = value.stride() == ref.stride and value.dtype == ref.dtype and type(value) in (Tensor, nn.Parameter)
    storage = value.untyped_storage() if same else None
    if storage is not None and offset >= 0 and storage.nbytes() - offset >= tape.storages[found.storage].nbytes:
        found.memory = storage, int(offset)
    if tape.after_block is not None:
        tape.after_block.waiting.filled(found.storage)


def claim_all(values: Any) -> None:
    """Do that for all tensors among arguments, also in lists and tuples, that are of torch's own classes."""
    for value in values:
        if type(value) in (Tensor, nn.Parameter):
            if value.is_meta:
                claim(value)
        elif isinstance(value, (list, tuple)) or type(value) is type({}.values()):
            claim_all(value)


def first_recorded(values: Any) -> RecordedTensor | None:
    """Return the first recorded tensor among arguments, also in lists and tuples."""
    for value in values:
        if isinstance(value, RecordedTensor):
            return value
        if isinstance(value, (list, tuple)) or type(value) is type({}.values()):
            found = first_recorded(value)
            if found is not None:
                return found
    return None


def _later(tensor: RecordedTensor) -> Any:
    """Return what answers for ``tensor`` where no block is open."""
    found = tensor._twin.recorded
    assert found is not None
    return found.tape.after_block
