"""What a module keeps of those of its tensors that have memory but no values yet."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from fabric_init._text import dtype_name
from fabric_init.distributed.agreement import Agreement
from fabric_init.errors import UninitializedTensorError
from fabric_init.guard.sentinels import (
    has_mark,
    is_exact_mark,
    is_float,
    is_mark,
    is_written_in_part,
    marked_elements,
    version_of,
)
from fabric_init.planning.placement import Placement
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.liveness import covers
from fabric_init.recording.replay import real_execution
from fabric_init.recording.tape import Tape, TensorRef
from fabric_init.reports.registry import RowRecord
from fabric_init.reports.rows import Status

_THREE_WAYS = (
    "Load them (fabric.load, fabric.load_raw or load_state_dict), or declare the load so that it is done for you "
    "(init_module(checkpoint=…)), or give them the model's own init (fabric.init_missing(model))."
)
ATTRIBUTE = "_fabric_init_unfilled"
BUILT = "_fabric_init_built"
"""Where each guarded module keeps what it shares with those that were built with it."""

Place = tuple["weakref.ref[nn.Module]", str, TensorRef]
"""Where a recorded storage has become a tensor: the module, the attribute, and how it lies there."""


@dataclass(frozen=True)
class Unfilled:
    """One tensor of one module that waits for values, and what tells whether they have come.

    ``tensor`` and ``version`` say what was there when it got its memory. Without ``slot.ref`` it is one that user code
    has computed from such memory, which nobody but the user can give values.
    """

    attribute: str
    slot: TensorInfo
    tape: Tape
    placement: Placement
    row: RowRecord
    tensor: Tensor | None
    version: int

    def written(self, now: Tensor | None, *, by_load: bool = False) -> bool:
        """Whether somebody has put values into ``now``, which is in the tensor's place today.

        In place, which the version counter shows, unless marks are left: then it was written in part, or only computed
        with. Through ``.data``, or by putting another tensor there, which removes the marks: for floats all of them
        have to go. A cast or another memory layout keeps them.
        """
        if now is None:
            return True  # the model does without it
        if now.is_meta:
            return False
        if (by_load or self.slot.ref is None) and now is not self.tensor:
            return True  # load_state_dict(assign=True)
        changed = self.changed(now)
        found = marked_elements(self.placement.held(now)) if self.slot.ref is not None else None
        if found is None:
            return changed or now is not self.tensor
        if changed and by_load:  # a load may bring NaN; what it lacks, it may copy onto itself
            return not (is_exact_mark(found) if now.dtype == self.slot.dtype else is_mark(found))
        if changed:
            return not (has_mark(found) if is_float(found) else is_written_in_part(found, self.placement.held(now)))
        return not (has_mark(found) if is_float(found) else is_mark(found))

    def changed(self, now: Tensor) -> bool:
        return now is self.tensor and version_in(self.placement, now) != self.version

    @property
    def is_part(self) -> bool:
        """Whether no rank holds it alone."""
        return self.tensor is not None and self.placement.held(self.tensor) is not self.tensor

    def visible(self, now: Tensor) -> bool:
        """Whether this rank can tell: of a shard without elements, it cannot."""
        return self.placement.held(now).numel() > 0


def version_in(placement: Placement, tensor: Tensor) -> int:
    """How often a tensor was written in place, through the whole or through this rank's part of it."""
    held = placement.held(tensor)
    return version_of(tensor) if held is tensor else version_of(tensor) + version_of(held)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``module`` itself."""
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def tensor_at(module: nn.Module | None, attribute: str) -> Tensor | None:
    """The parameter or buffer; not what a property of that name computes."""
    if module is None:
        return None
    found = module._parameters.get(attribute)
    return found if found is not None else module._buffers.get(attribute)


Initialize = Callable[[Sequence[tuple[nn.Module, "Unfilled"]]], None]
"""Runs the model's own init for those of the tensors that it gives a value."""


class ModelState:
    """What the modules of one model share while some of their tensors wait for values.

    A deep copy of modules shares one of its own, which they enter as they are copied.
    """

    def __init__(self, model: str, initialize: Initialize, agreement: Agreement | None = None) -> None:
        self.model = model  # the class of the model that was built
        self.initialize = initialize  # what a load does not bring
        self.agreement = agreement  # of ranks that only together hold it
        self.waiting: dict[ModuleState, None] = {}  # in all its modules, in order
        self.places: dict[int, Place | None] = {}  # by recorded storage, all tensors that have waited
        with _alive_changes:
            _alive.add(self)

    def enter(self, module: nn.Module, item: Unfilled) -> None:
        """Keep in mind where a tensor is, for others that are computed from it."""
        ref = item.slot.ref
        if ref is not None and covers(item.tape, ref):
            known = self.places.get(ref.storage)
            if known is None or tensor_at(known[0](), known[1]) is None:
                self.places[ref.storage] = weakref.ref(module), item.attribute, ref

    def refuse(self, use: str, others: Sequence[ModuleState] = (), elsewhere: Iterable[str] = ()) -> NoReturn:
        """Raise with the names of all that waits, here and elsewhere in the model: one round to fix it all."""
        for waiting in tuple(self.waiting):
            waiting.settle()
        names = dict.fromkeys(
            item.slot.name for waiting in (*self.waiting, *others) if waiting.module for item in waiting.items
        )
        names.update(dict.fromkeys(elsewhere))
        listed = "\n".join(f"  {name}" for name in names)
        which = "one of its tensors was" if len(names) == 1 else f"{len(names)} of its tensors were"
        raise UninitializedTensorError(
            f"{self.model} cannot {use}: {which} neither loaded nor initialized:\n{listed}\n" + _THREE_WAYS
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        copied = ModelState(self.model, self.initialize, self.agreement)
        copied.places = dict.fromkeys(self.places)
        return copied

    def __reduce__(self) -> tuple[type[ModelState], tuple[str, Initialize]]:
        return ModelState, (self.model, self.initialize)


_alive: weakref.WeakSet[ModelState] = weakref.WeakSet()
_alive_changes = threading.Lock()


def all_waiting() -> Iterator[ModuleState]:
    """In every model of this process."""
    with _alive_changes:  # other threads build models, too
        alive = tuple(_alive)
    for built in alive:
        yield from tuple(built.waiting)


class ModuleState:
    """A module's own tensors that wait for values. Guards a deep copy too, and refuses to be pickled."""

    def __init__(self, module: nn.Module | None, built: ModelState, names: Iterable[str] = ()) -> None:
        self.items: list[Unfilled] = []
        self.built = built
        self.names = frozenset(names)  # of all tensors of the module, when some began to wait
        self._module = None if module is None else weakref.ref(module)
        built.waiting[self] = None

    @property
    def module(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def settle(self, status: Status = "written by the user", module: nn.Module | None = None) -> None:
        """Take note of what has been written since the last look."""
        module = self.module or module
        if module is None:
            return
        self._module = weakref.ref(module)
        with real_execution():
            left = []
            for item in self.items:
                self.built.enter(module, item)
                now = tensor_at(module, item.attribute)
                if not item.written(now, by_load=status == "loaded"):
                    left.append(item)
                elif item.row.row.status == "unfilled":
                    item.row.update(status=status)
                    if now is not None:
                        item.row.update(dtype=dtype_name(now.dtype))
        self.items = left
        if not left:
            self.end(module)

    def end(self, module: nn.Module) -> None:
        """Nothing in ``module`` waits any more."""
        vars(module).pop(ATTRIBUTE, None)
        self.built.waiting.pop(self, None)

    def before_load(self, module: nn.Module) -> None:
        """What was written until now is not this load's doing."""
        self.settle(module=module)
        now = [(item, tensor_at(module, item.attribute)) for item in self.items]
        self.items = [
            item if t is None else replace(item, tensor=t, version=version_in(item.placement, t)) for item, t in now
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleState:
        module = self.module
        other = memo.get(id(module)) if module is not None else None
        copied = ModuleState(other, copy.deepcopy(self.built, memo), self.names)
        for item in self.items:  # the module's tensors have been copied already
            tensor = memo.get(id(item.tensor)) if item.tensor is not None else None
            version = 0 if tensor is None else version_in(item.placement, tensor)
            row = copy.deepcopy(item.row, memo)  # the model's report is not about its copies
            copied.items.append(replace(item, row=row, tensor=tensor, version=version))
        return copied

    def __reduce__(self) -> tuple[type[ModuleState], tuple[None, ModelState]]:
        self.settle()
        if self.items:
            self.built.refuse("be pickled")
        return ModuleState, (None, self.built)


def waiting_under(model: nn.Module) -> Iterator[tuple[nn.Module, ModuleState]]:
    """Every module in ``model`` with tensors that wait for values."""
    for module in model.modules():
        waiting = vars(module).get(ATTRIBUTE)
        if waiting is not None:
            yield module, waiting
