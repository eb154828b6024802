"""The state of modules with uninitialized tensors. See ``[Note: module states]``."""

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
    are_exact_sentinels,
    are_sentinels,
    has_sentinel,
    is_float,
    is_partly_written,
    sentinel_elements,
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
    """One uninitialized tensor of one module, and what shows whether it has been written since.

    ``tensor`` and ``version`` are those of the allocation. Without ``slot.ref`` it is a tensor that user code has
    computed from uninitialized memory, and that only user code can fill.
    """

    attribute: str
    slot: TensorInfo
    tape: Tape
    placement: Placement
    row: RowRecord
    tensor: Tensor | None
    version: int

    def written(self, now: Tensor | None, *, by_load: bool = False) -> bool:
        """Return whether ``now``, the tensor in this place today, has been written.

        The version counter shows writes in place, unless sentinels are left: then it was written in part, or only
        computed with. A write through ``.data``, or another tensor in its place, removes the sentinels: for floats all
        of them have to be gone. A cast or another memory layout keeps them.
        """
        if now is None:
            return True  # the model does without it
        if now.is_meta:
            return False
        if (by_load or self.slot.ref is None) and now is not self.tensor:
            return True  # load_state_dict(assign=True)
        changed, local = self.changed(now), self.placement.held(now)
        samples = sentinel_elements(local) if self.slot.ref is not None else None
        if samples is None:
            return changed or now is not self.tensor
        if changed and by_load:  # a load may bring NaN; what it lacks, it may copy onto itself
            return not (are_exact_sentinels(samples) if now.dtype == self.slot.dtype else are_sentinels(samples))
        if changed:
            return not (has_sentinel(samples) if is_float(samples) else is_partly_written(samples, local))
        return not (has_sentinel(samples) if is_float(samples) else are_sentinels(samples))

    def changed(self, now: Tensor) -> bool:
        """Return whether ``now`` is the same tensor, written in place since."""
        return now is self.tensor and version_in(self.placement, now) != self.version

    @property
    def is_part(self) -> bool:
        """Whether this rank holds only a shard of it."""
        return self.tensor is not None and self.placement.held(self.tensor) is not self.tensor

    def visible(self, now: Tensor) -> bool:
        """Return whether this rank sees if it is written: a shard without elements does not show it."""
        return self.placement.held(now).numel() > 0


def version_in(placement: Placement, tensor: Tensor) -> int:
    """Return how often a tensor was written in place, through the full tensor or this rank's part of it."""
    held = placement.held(tensor)
    return version_of(tensor) if held is tensor else version_of(tensor) + version_of(held)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``module`` itself, by attribute."""
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def tensor_at(module: nn.Module | None, attribute: str) -> Tensor | None:
    """Return the parameter or buffer, and not what a property of that name computes."""
    if module is None:
        return None
    parameter = module._parameters.get(attribute)
    return parameter if parameter is not None else module._buffers.get(attribute)


Initialize = Callable[[Sequence[tuple[nn.Module, "Unfilled"]]], None]
"""Runs the model's own init for those of the tensors that it can initialize."""


class ModelState:
    """The state that the modules of one model share while some of their tensors are uninitialized.

    A deep copy of the modules has a shared state of its own.
    """

    def __init__(self, model: str, initialize: Initialize, agreement: Agreement | None = None) -> None:
        self.model = model  # the class of the model that was built
        self.initialize = initialize  # what a load does not bring
        self.agreement = agreement  # of ranks that only together hold it
        self.module_states: dict[ModuleState, None] = {}  # in all its modules, in order
        self.places: dict[int, Place | None] = {}  # by recorded storage, all tensors that were uninitialized
        with _alive_changes:
            _alive.add(self)

    def enter(self, module: nn.Module, item: Unfilled) -> None:
        """Remember where a tensor is, for others that are computed from it."""
        ref = item.slot.ref
        if ref is not None and covers(item.tape, ref):
            known = self.places.get(ref.storage)
            if known is None or tensor_at(known[0](), known[1]) is None:
                self.places[ref.storage] = weakref.ref(module), item.attribute, ref

    def refuse(self, use: str, others: Sequence[ModuleState] = (), elsewhere: Iterable[str] = ()) -> NoReturn:
        """Raise with the names of all uninitialized tensors, here and elsewhere in the model.

        Raises:
            UninitializedTensorError: Always.
        """
        for state in tuple(self.module_states):
            state.refresh()
        names = dict.fromkeys(
            item.slot.name for state in (*self.module_states, *others) if state.module for item in state.items
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


def all_states() -> Iterator[ModuleState]:
    """Yield the states of all modules with uninitialized tensors in this process."""
    with _alive_changes:  # other threads build models, too
        alive = tuple(_alive)
    for built in alive:
        yield from tuple(built.module_states)


class ModuleState:
    """A module's own uninitialized tensors. Guards a deep copy too, and refuses to be pickled."""

    def __init__(self, module: nn.Module | None, built: ModelState, names: Iterable[str] = ()) -> None:
        self.items: list[Unfilled] = []
        self.built = built
        self.names = frozenset(names)  # of all tensors of the module when it was allocated
        self._module = None if module is None else weakref.ref(module)
        built.module_states[self] = None

    @property
    def module(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def refresh(self, status: Status = "written by the user", module: nn.Module | None = None) -> None:
        """Find out which tensors have been written since the last call, and stop tracking them.

        Args:
            status: The status of those in the report.
            module: The module, for a state that was unpickled or copied without it.
        """
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
        """Remove this state from ``module``, whose tensors all have values."""
        vars(module).pop(ATTRIBUTE, None)
        self.built.module_states.pop(self, None)

    def before_load(self, module: nn.Module) -> None:
        """Find out what has been written until now, so that it is not attributed to this load."""
        self.refresh(module=module)
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
        self.refresh()
        if self.items:
            self.built.refuse("be pickled")
        return ModuleState, (None, self.built)


def states_under(model: nn.Module) -> Iterator[tuple[nn.Module, ModuleState]]:
    """Yield every module in ``model`` that has uninitialized tensors of its own, with their state."""
    for module in model.modules():
        state = vars(module).get(ATTRIBUTE)
        if state is not None:
            yield module, state
