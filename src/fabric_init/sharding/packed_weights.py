"""Show a model as it was before its weights were packed, or put into wrappers, such as quantized ones.

[Note: made of plain tensors]
A *plain* tensor is a recorded one that a checkpoint knows, and that the model's own code initializes. A model may hold
something else in its place, which is computed from it on the tape: a wrapper (see [Note: wrapped recorded tensors]), as
torchao makes, or a parameter that its own class has packed, as bitsandbytes does, with what it keeps beside that. What
plans a load, or looks for the model's own init, sees the plain tensors (:func:`as_plain_model`); the plan is then one
for what the model holds (``filling/packed/plan.py``), and that is filled like all else that is computed from loaded
tensors: each of these is read once, on its device, and released. From a checkpoint of a model that was quantized
already, the tensors inside a wrapper are loaded under names of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.planning.tensors import Walk, Walked, named_tensors, walked
from fabric_init.recording.tape.liveness import covers, is_final, live_ops
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, meta_of, recorded
from fabric_init.recording.tensor.storage_tags import StorageTag, ref_of
from fabric_init.recording.tensor.wrappers import inner_tensors, is_wrapper, recorded_parts
from fabric_init.sharding.dtensor import local
from fabric_init.sharding.module_tables import TableEntry, plain_tensor, swapped_in, table_entries


class HeldInstead(NamedTuple):
    """What a model holds that is made of one plain tensor: ``held``, by its names, and that one itself if ``kept``."""

    held: dict[str, Tensor]
    kept: bool


class Substitution(NamedTuple):
    """What is in the places of what is made of plain tensors.

    Attributes:
        walk: Over the model as it is shown.
        plain: By the id of a plain tensor: what is made of it.
        apart: By the id of a tensor inside a wrapper, which is shown itself: that wrapper.
    """

    walk: Walk
    plain: dict[int, HeldInstead]
    apart: dict[int, Tensor]

    def held(self, tensor: Tensor) -> list[Tensor]:
        """Return what the model holds where ``tensor`` is shown."""
        made = self.plain.get(id(tensor))
        return [tensor] if made is None else [*made.held.values(), *([tensor] if made.kept else [])]

    def wrappers(self) -> list[Tensor]:
        """Return the wrappers that are not shown."""
        held = (tensor for made in self.plain.values() for tensor in made.held.values())
        return [tensor for tensor in (*held, *self.apart.values()) if is_wrapper(tensor)]


def wraps(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a wrapper, or a DTensor of one."""
    return is_wrapper(local(tensor))


def is_packed(tensor: Tensor) -> bool:
    """Return whether a recorded parameter, which has no values, was packed by its class."""
    with DisableTorchFunction():
        found = recorded(tensor)
    if found is None or found.memory is not None:
        return False
    ref = found.tape.made_of.get(found.storage)
    return ref is not None and ref.storage != found.storage and isinstance(tensor, nn.Parameter)


@contextmanager
def as_plain_model(
    model: Walked, *chosen: Callable[[Tensor], bool], names: Collection[str] = ()
) -> Iterator[Substitution]:
    """Context in which ``model`` has plain recorded tensors in the places of what waits for values and is made of them.

    Where ``names`` has names for the tensors inside a wrapper, or these are not made of one parameter, they are in its
    place themselves: ``_weight_scale`` for the scale of ``weight``, as torchao names them in safetensors files.

    Args:
        model: The model.
        chosen: What is shown as it was: :func:`wraps`, :func:`is_packed` or both.
        names: Those that a checkpoint has.

    Raises:
        RecordingError: A parameter was changed since it was put into a wrapper.
        FabricInitError: In the context, a plain tensor was replaced.
    """
    walk = walked(model)
    found = table_entries(walk, lambda tensor: any(each(tensor) for each in chosen))
    tensors = _by_ref(walk) if found else {}
    stand_ins: dict[TensorRef, Tensor] = {}
    seen = Substitution(walk, {}, {})
    instead: list[tuple[TableEntry, Mapping[str, Tensor]]] = []
    for place in found:
        tensor = place.tensor
        apart = {f"_{place.key}_{name}": inner for name, inner in _inside(tensor).items()}
        are_saved = any(place.prefix + key in names for key in apart)
        if not are_saved and not _waiting(tensor):
            continue
        origin = None if are_saved else _origin(place)
        if origin is None:
            _refuse_nested(place, apart)
            seen.apart.update((id(inner), tensor) for inner in apart.values())
            instead.append((place, apart))
            continue
        ref = origin[0]
        if ref not in stand_ins:
            stand_ins[ref] = tensors[ref] if ref in tensors else _in_class_of(tensor, plain_tensor(*origin, tensor))
            seen.plain[id(stand_ins[ref])] = HeldInstead({}, ref in tensors)
        seen.plain[id(stand_ins[ref])].held[place.name] = tensor
        instead.append((place, {place.key: stand_ins[ref]}))
    with swapped_in(instead, _refuse_replaced):
        yield seen._replace(walk=Walk(walk.model)) if instead else seen


def _refuse_replaced(changed: list[TableEntry]) -> None:
    for place in changed:
        if wraps(place.tensor):  # in the place of a packed tensor, load code puts what was saved packed
            raise FabricInitError(
                f"{place.key} was put into a tensor subclass already, and the load code of its module puts "
                "another tensor in its place. Load before that, or leave that code out."
            )


def _inside(tensor: Tensor) -> dict[str, Tensor]:
    return inner_tensors(local(tensor)) if wraps(tensor) else {}


def _in_class_of(packed: Tensor, plain: Tensor) -> Tensor:
    """Return ``plain`` in the class of a packed parameter, of which load code may want it."""
    if isinstance(packed, RecordedTensor) and type(packed) is not RecordedTensor:
        plain.__class__ = type(packed)
    return plain


def _waiting(tensor: Tensor) -> list[StorageTag]:
    """Return the recordings of the tensors in a wrapper that have no values."""
    found = [recorded(part) for part in recorded_parts(tensor)]
    return [each for each in found if each is not None and each.memory is None]


def _refuse_nested(place: TableEntry, apart: dict[str, Tensor]) -> None:
    if isinstance(place.tensor, DTensor) or any(map(is_wrapper, apart.values())):
        raise RecordingError(
            f"{place.name} is a {type(local(place.tensor)).__name__} that was sharded before it had values, and was "
            "not made of one recorded parameter. Fill the model first, and shard it then."
        )


def _origin(place: TableEntry) -> tuple[TensorRef, Tape] | None:
    """Return the recorded parameter that a packed one, or all inner tensors of a wrapper are made of, if there is one.

    Raises:
        RecordingError: It was changed since.
    """
    waiting = {found.storage: found.tape for found in _waiting(place.tensor)}
    tape = next(iter(waiting.values()))
    refs = {ref.storage: ref for storage in waiting if (ref := tape.made_of.get(storage)) is not None}
    if is_packed(place.tensor):
        return next(iter(refs.values())), tape
    refs |= tape.after_block.waiting.refs
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


def _by_ref(walk: Walk) -> dict[TensorRef, Tensor]:
    """Return the recorded tensors of a model by where they are."""
    found: dict[TensorRef, Tensor] = {}
    for _, _, tensor in named_tensors(walk):
        if isinstance(tensor, RecordedTensor) and (its := recorded(tensor)) is not None:
            with DisableTorchFunction():
                found.setdefault(ref_of(meta_of(tensor), its.storage), tensor)
    return found
