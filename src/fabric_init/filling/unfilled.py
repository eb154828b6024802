"""What a module keeps of those of its tensors that have memory but no values yet."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from fabric_init.errors import UninitializedTensorError
from fabric_init.filling.marks import (
    has_mark,
    is_exact_mark,
    is_float,
    is_mark,
    is_written_in_part,
    marked_elements,
    version_of,
)
from fabric_init.filling.placement import Placement
from fabric_init.filling.report import Row, Status, dtype_name
from fabric_init.filling.slots import Slot
from fabric_init.recording.replay import real_execution
from fabric_init.recording.tape import Tape, TensorRef

_THREE_WAYS = (
    "Load them (fabric.load, fabric.load_raw or load_state_dict), or declare the load so that it is done for you "
    "(init_module(checkpoint=…)), or give them the model's own init (fabric.init_missing(model))."
)
ATTRIBUTE = "_fabric_init_unfilled"


Family = dict[int, tuple["weakref.ref[nn.Module]", str, TensorRef]]
"""By recorded storage, all tensors that waited in a model: their module and attribute, and how they lie there."""


@dataclass(frozen=True)
class Unfilled:
    """One tensor of one module that waits for values, and what tells whether they have come.

    ``tensor`` and ``version`` say what was there when it got its memory; ``None`` in a copy of the model.
    """

    attribute: str
    slot: Slot
    tape: Tape
    placement: Placement
    row: Row
    tensor: Tensor | None
    version: int
    family: Family = field(default_factory=dict)

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
        if by_load and now is not self.tensor:
            return True  # load_state_dict(assign=True)
        changed = self.changed(now)
        found = marked_elements(self.placement.held(now))
        if found is None:
            return changed or now is not self.tensor
        if changed and by_load:  # a load may bring NaN; what it lacks, it may copy onto itself
            return not (is_exact_mark(found) if now.dtype == self.slot.dtype else is_mark(found))
        if changed:
            return not (has_mark(found) if is_float(found) else is_written_in_part(found, self.placement.held(now)))
        return not (has_mark(found) if is_float(found) else is_mark(found))

    def changed(self, now: Tensor) -> bool:
        return now is self.tensor and version_in(self.placement, now) != self.version

    def visible(self, now: Tensor) -> bool:
        """Whether this rank can tell: of a shard without elements, it cannot."""
        return self.placement.held(now).numel() > 0


def version_in(placement: Placement, tensor: Tensor) -> int:
    """How often a tensor was written in place, through the whole or through this rank's part of it."""
    held = placement.held(tensor)
    return version_of(tensor) if held is tensor else version_of(tensor) + version_of(held)


class Waiting:
    """A module's own tensors that wait for values. Guards a deep copy too, and refuses to be pickled."""

    def __init__(
        self,
        module: nn.Module | None = None,
        items: Iterable[Unfilled] = (),
        model: str = "",
    ) -> None:
        self.items = list(items)
        self.model = model  # the class of the model that was built
        self.everywhere: list[Waiting] = [self]  # in all modules of that model
        self._module = None if module is None else weakref.ref(module)

    def refuse(self, use: str, others: Sequence[Waiting] = (), elsewhere: Iterable[str] = ()) -> NoReturn:
        """Raise with the names of all that waits, here and elsewhere in the model: one round to mend it all."""
        for waiting in self.everywhere:
            waiting.settle()
        names = dict.fromkeys(item.slot.name for waiting in (*self.everywhere, *others) for item in waiting.items)
        names.update(dict.fromkeys(elsewhere))
        listed = "\n".join(f"  {name}" for name in names)
        which = "one of its tensors was" if len(names) == 1 else f"{len(names)} of its tensors were"
        raise UninitializedTensorError(
            f"{self.model} cannot {use}: {which} neither loaded nor initialised:\n{listed}\n" + _THREE_WAYS
        )

    def settle(self, status: Status = "written by the user", module: nn.Module | None = None) -> None:
        """Take note of what has been written since the last look; a copy has to be told its ``module``."""
        module = module or self._owner()
        if module is None:
            return
        with real_execution():
            left = []
            for item in self.items:
                now = getattr(module, item.attribute, None)
                if not item.written(now, by_load=status == "loaded"):
                    left.append(item)
                elif item.row.status == "unfilled":
                    item.row.status = status
                    item.row.dtype = item.row.dtype if now is None else dtype_name(now.dtype)
        self.items = left
        if not left:
            vars(module).pop(ATTRIBUTE, None)

    def before_load(self, module: nn.Module) -> None:
        """What was written until now is not this load's doing."""
        self.settle(module=module)
        now = [(item, getattr(module, item.attribute, None)) for item in self.items]
        self.items = [
            item if t is None else replace(item, tensor=t, version=version_in(item.placement, t)) for item, t in now
        ]

    def _owner(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return Waiting(None, (replace(item, tensor=None, family={}) for item in self.items), self.model)

    def __reduce__(self) -> tuple[type[Waiting], tuple[()]]:
        self.settle()
        if self.items:
            self.refuse("be pickled")
        return Waiting, ()


def waiting_under(model: nn.Module) -> Iterator[tuple[nn.Module, Waiting]]:
    """Every module in ``model`` with tensors that wait for values."""
    for module in model.modules():
        waiting = vars(module).get(ATTRIBUTE)
        if waiting is not None:
            yield module, waiting
