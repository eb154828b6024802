"""Where modules hold tensors, and how others are shown there for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.planning.tensors import Walked, plain_name, walked
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import make_recorded_tensor
from fabric_init.recording.tensor.storage_tags import tensor_on


class TableEntry(NamedTuple):
    """Where a module has a parameter or buffer: under ``key`` in the table of that ``kind``."""

    prefix: str
    module: nn.Module
    kind: str
    key: str
    tensor: Any

    @property
    def table(self) -> dict[str, Any]:
        """The table; load code that is undone leaves the module with another one."""
        return getattr(self.module, self.kind)  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """The name in the model."""
        return plain_name(self.prefix + self.key)


def table_entries(model: Walked, chosen: Callable[[Tensor], bool]) -> list[TableEntry]:
    """Return the places of the parameters and buffers that are ``chosen``, in module order."""
    walk = walked(model)
    if not any(chosen(tensor) for _, _, tensor in walk.registered):
        return []
    return [
        TableEntry(f"{prefix}." if prefix else "", module, kind, key, tensor)
        for prefix, module in walk.once
        for kind in ("_parameters", "_buffers")
        for key, tensor in getattr(module, kind).items()
        if tensor is not None and chosen(tensor)
    ]


def putting_back(found: Iterable[TableEntry]) -> Callable[[], None]:
    """Return what lets modules hold in the tables of these places what they hold now."""
    kept = [(place, dict(place.table)) for place in {(id(each.module), each.kind): each for each in found}.values()]

    def put_back() -> None:
        for place, tensors in kept:
            table = place.table
            table.clear()
            table.update(tensors)

    return put_back


def plain_tensor(ref: TensorRef, tape: Tape, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the recorded tensor ``ref``, cast to ``dtype``; a parameter if ``like`` is one."""
    with DisableTorchFunction(), DisableTorchDispatch(), torch.no_grad():
        plain: Tensor = make_recorded_tensor(tensor_on(tape, ref), tape.storages[ref.storage].device)
    with torch.no_grad():
        if dtype not in (None, plain.dtype):
            plain = plain.to(dtype)
    return nn.Parameter(plain, like.requires_grad) if isinstance(like, nn.Parameter) else plain


@contextmanager
def swapped_in(
    instead: Sequence[tuple[TableEntry, Mapping[str, Tensor]]], check: Callable[[list[TableEntry]], None]
) -> Iterator[None]:
    """Context in which modules hold other tensors, by their keys, in some of their places.

    ``check`` gets the places in which there is something else at the end, which stays there if it does not raise.
    """
    put_back = putting_back(place for place, _ in instead)
    stay: list[tuple[TableEntry, str, Any]] = []
    try:
        for place, others in instead:
            if place.key not in others:
                del place.table[place.key]
            place.table.update(others)
        yield
        changed = [place for place, others in instead if any(place.table.get(key) is not others[key] for key in others)]
        check(changed)
        stay = [(place, place.key, place.table.get(place.key)) for place in changed]
        ours = {(id(place.module), place.kind, key) for place, others in instead for key in (place.key, *others)}
        for place, _ in instead:
            its = id(place.module), place.kind
            stay += [(place, key, tensor) for key, tensor in place.table.items() if (*its, key) not in ours]
    finally:
        put_back()
        for place, key, tensor in stay:
            place.table[key] = tensor
