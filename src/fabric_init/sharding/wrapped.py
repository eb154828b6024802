"""Show a model whose weights were put into wrappers, such as quantized ones, as it was before.

A wrapper (see [Note: wrapped recorded tensors]) has the place of a parameter that a checkpoint knows, and that the
model's own code initializes. The tape says how the tensors that it holds were made from that parameter. So what plans
a load, or looks for the model's own init, sees the plain parameter (:func:`seen_plain`), and what fills computes the
inner tensors from it (:class:`Wrapped`). From a checkpoint of a model that was quantized already, the inner tensors are
loaded under names of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.planning.tensors import Walked, named_modules, named_tensors, plain_name
from fabric_init.recording.liveness import covers, is_final, live_ops
from fabric_init.recording.storage_tags import Recorded, ref_of, tensor_on
from fabric_init.recording.tape import Tape, TensorRef
from fabric_init.recording.tensor import RecordedTensor, meta_of, recorded, recorded_tensor
from fabric_init.recording.wrappers import inner_tensors, is_wrapper, recorded_parts
from fabric_init.sharding.dtensor import local


class Wrapped(NamedTuple):
    """The wrappers that are made of one plain tensor.

    Attributes:
        plain: That tensor, on ``tape``.
        tape: The tape that says how.
        wrappers: The wrappers, by their name in the model.
        kept: Whether the model holds the plain tensor as well.
    """

    plain: TensorRef
    tape: Tape
    wrappers: dict[str, Tensor]
    kept: bool


class Shown(NamedTuple):
    """What is in the places of wrappers.

    Attributes:
        plain: By the id of a plain tensor: what is made of it.
        apart: By the id of a tensor inside a wrapper, which is shown itself: that wrapper.
    """

    plain: dict[int, Wrapped]
    apart: dict[int, Tensor]


@contextmanager
def seen_plain(model: Walked, names: Collection[str] = ()) -> Iterator[Shown]:
    """Context in which ``model`` has plain recorded tensors in the places of wrappers that wait for values.

    Where ``names`` has names for the tensors inside a wrapper, or these are not made of one parameter, they are in its
    place themselves: ``_weight_scale`` for the scale of ``weight``, as torchao names them in safetensors files.

    Raises:
        RecordingError: A parameter was changed since it was put into a wrapper.
        FabricInitError: In the context, a plain tensor was replaced.
    """
    places = list(_places(model))
    shown = Shown({}, {})
    before = [(table, dict(table)) for table in {id(place.table): place.table for place in places}.values()]
    tensors = _by_ref(model) if places else {}
    stand_ins: dict[TensorRef, Tensor] = {}
    try:
        for place in places:
            apart = {f"_{place.key}_{name}": tensor for name, tensor in inner_tensors(local(place.tensor)).items()}
            are_saved = any(place.prefix + key in names for key in apart)
            if not are_saved and not _waiting(place.tensor):
                continue
            origin = None if are_saved else _origin(place)
            if origin is not None:
                ref, tape = origin
                if ref not in stand_ins:
                    held = tensors.get(ref)
                    stand_ins[ref] = _plain(ref, tape, place.tensor) if held is None else held
                    shown.plain[id(stand_ins[ref])] = Wrapped(ref, tape, {}, held is not None)
                shown.plain[id(stand_ins[ref])].wrappers[place.name] = place.tensor
                place.table[place.key] = stand_ins[ref]
            else:
                _refuse_nested(place, apart)
                del place.table[place.key]
                place.table.update(apart)
                shown.apart.update((id(tensor), place.tensor) for tensor in apart.values())
        seen = [(table, dict(table)) for table, _ in before]
        yield shown
        for table, its in seen:
            replaced = [key for key, tensor in its.items() if table.get(key) is not tensor]
            if replaced:
                raise FabricInitError(
                    f"{replaced[0]} was put into a tensor subclass already, and the load code of its module puts "
                    "another tensor in its place. Load before that, or leave that code out."
                )
    finally:
        for table, its in before:
            table.clear()
            table.update(its)


class _Place(NamedTuple):
    prefix: str
    table: dict[str, Any]
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return plain_name(self.prefix + self.key)


def _places(model: Walked) -> Iterator[_Place]:
    """Yield the places of wrappers, also of those that are sharded, in module order."""
    for prefix, module in named_modules(model):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, tensor in table.items():
                if tensor is not None and is_wrapper(local(tensor)):
                    yield _Place(f"{prefix}." if prefix else "", table, key, tensor)


def _waiting(tensor: Tensor) -> list[Recorded]:
    """Return the recordings of the tensors in a wrapper that have no values."""
    found = [recorded(part) for part in recorded_parts(tensor)]
    return [each for each in found if each is not None and each.memory is None]


def _refuse_nested(place: _Place, apart: dict[str, Tensor]) -> None:
    if isinstance(place.tensor, DTensor) or any(map(is_wrapper, apart.values())):
        raise RecordingError(
            f"{place.name} is a {type(local(place.tensor)).__name__} that was sharded before it had values, and was "
            "not made of one recorded parameter. Fill the model first, and shard it then."
        )


def _origin(place: _Place) -> tuple[TensorRef, Tape] | None:
    """Return the recorded parameter that all inner tensors of a wrapper are made of, if there is one.

    Raises:
        RecordingError: It was changed since.
    """
    waiting = {found.storage: found.tape for found in _waiting(place.tensor)}
    tape = next(iter(waiting.values()))
    refs = {ref.storage: ref for storage in waiting if (ref := tape.replaced.get(storage)) is not None}
    refs |= tape.later.waiting.refs
    registered = tape.registered.union(refs)
    sources = {storage for storage in waiting if storage in refs}
    live = [tape.ops[number] for number in live_ops(tape, set(waiting) - sources, exact=False, cut=registered)]
    read = {(ref.storage, op.number) for op in live for ref in op.reads() if ref.storage in registered}
    sources |= {storage for storage, _ in read}
    source = sources.pop() if len(sources) == 1 else -1
    if source not in refs or not covers(tape, refs[source]):
        return None
    if any(not is_final(tape, source, number) for _, number in read):
        raise RecordingError(
            f"{place.name} was changed after a {type(local(place.tensor)).__name__} was made of it. Make that last."
        )
    return refs[source], tape


def _by_ref(model: Walked) -> dict[TensorRef, Tensor]:
    """Return the recorded tensors of ``model`` by where they are."""
    found: dict[TensorRef, Tensor] = {}
    for _, _, tensor in named_tensors(model):
        if isinstance(tensor, RecordedTensor) and (its := recorded(tensor)) is not None:
            with DisableTorchFunction():
                found.setdefault(ref_of(meta_of(tensor), its.storage), tensor)
    return found


def _plain(ref: TensorRef, tape: Tape, wrapper: Tensor) -> Tensor:
    with DisableTorchFunction(), DisableTorchDispatch(), torch.no_grad():
        plain: Tensor = recorded_tensor(tensor_on(tape, ref), tape.storages[ref.storage].device)
    return nn.Parameter(plain, wrapper.requires_grad) if isinstance(wrapper, nn.Parameter) else plain
