"""A tensor that has memory but no values cannot be used or saved."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fabric_init.errors import UninitializedTensorError
from fabric_init.filling.fill import fill, make_report
from fabric_init.filling.materialize import survey
from fabric_init.filling.placement import Placement
from fabric_init.filling.plan import Action, Entry, Plan, Wanted, make_plan
from fabric_init.filling.report import InitReport, Row, keep_report, report_of
from fabric_init.filling.slots import Slot, named_modules
from fabric_init.recording.replay import real_execution
from fabric_init.recording.tape import Tape

_THREE_WAYS = (
    "Load them (fabric.load, fabric.load_raw or load_state_dict), or declare the load so that it is done for you "
    "(init_module(checkpoint=…)), or give them the model's own init (fabric.init_missing(model))."
)
_MOST_NAMES = 40


class _Unfilled(NamedTuple):
    """One tensor that is waiting for values, and what tells whether they have come."""

    entry: Entry
    owner: nn.Module
    attribute: str
    tensor: Tensor
    version: int

    def now(self) -> Tensor | None:
        """Whatever is in the tensor's place in the model today."""
        return getattr(self.owner, self.attribute, None)

    def written(self) -> bool:
        """Whether somebody has put values there: in place, through ``.data``, or by putting another tensor there."""
        tensor = self.now()
        if tensor is None:
            return True  # the model does without it now
        if tensor is self.tensor and tensor._version != self.version:
            return True
        if tensor.is_meta:
            return False
        samples = _samples(tensor)
        if samples is None:
            return tensor is not self.tensor
        return not _is_mark(samples)


def _samples(tensor: Tensor) -> Tensor | None:
    """The first, middle and last element; ``None`` where no value is improbable enough to tell marks from data."""
    count = tensor.numel()
    if count == 0 or tensor.dtype == torch.bool:
        return None
    flat = tensor.detach()
    if not flat.is_contiguous():
        order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
        flat = flat.permute(order)
        if not flat.is_contiguous():
            return None
    flat = flat.view(-1)
    return flat[torch.tensor([0, count // 2, count - 1], device=flat.device)]


def _mark_value(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    limits = torch.iinfo(dtype)
    return limits.max - 90 if limits.min == 0 else limits.min + 90


def _is_mark(samples: Tensor) -> bool:
    if samples.is_floating_point() or samples.is_complex():
        return bool((samples.float() if samples.is_floating_point() else samples).isnan().all())
    return bool((samples == _mark_value(samples.dtype)).all())


def _place_mark(tensor: Tensor) -> None:
    if tensor.numel() and tensor.dtype != torch.bool:
        flat = tensor.as_strided((tensor.numel(),), (1,))
        flat[0] = flat[tensor.numel() // 2] = flat[-1] = _mark_value(tensor.dtype)


class _AsTheyAreNow:
    """A placement for tensors that may have been moved or cast since they were given memory."""

    def __init__(self, placement: Placement) -> None:
        self.device = placement.device
        self.region = placement.region
        self._put = placement.put

    def put(self, slot: Slot, tensor: Tensor, value: Tensor) -> None:
        self._put(slot, tensor, value.to(device=tensor.device, dtype=tensor.dtype))


class Guard:
    """Watches one model whose tensors have memory but no values yet; goes away by itself when all are filled.

    Every read of the model that matters passes one of its hooks: ``forward`` and ``state_dict`` raise while a tensor is
    unfilled; ``load_state_dict`` tells what has come. A tensor counts as filled once somebody wrote it: its version
    counter says so, or the marks that lie in its first, middle and last element are gone (``.data`` writes bypass the
    counter; a cast keeps the marks).
    """

    def __init__(
        self, model: nn.Module, unfilled: Iterable[_Unfilled], tapes: Mapping[int, Tape], placement: Placement
    ) -> None:
        self._model = weakref.ref(model)
        self._tapes = tapes
        self._placement = placement
        self._unfilled = {item.entry.slot.name: item for item in unfilled}
        self._skipped_by_load: set[str] = set()
        self._handles: list[Any] = []
        owners = {id(module): module for item in self._unfilled.values() for module in (item.owner,)}
        owners[id(model)] = model
        for module in owners.values():
            self._handles += [
                module.register_forward_pre_hook(self._before_forward),
                module.register_state_dict_pre_hook(self._before_state_dict),
                module.register_load_state_dict_post_hook(self._after_load),
            ]

    def __reduce__(self) -> NoReturn:
        self.raise_unfilled("be pickled")

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.require("run")

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.require("be saved")

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.settle("loaded", under=module)
        mine = {name for name, item in self._unfilled.items() if item.owner is module}
        self._skipped_by_load |= mine
        if module is self._model():
            self._initialise(self._skipped_by_load & set(self._unfilled))

    def require(self, use: str) -> None:
        """Raise unless every tensor has its values.

        Raises:
            UninitializedTensorError: naming every tensor without values, and the ways to give it some.
        """
        self.settle("written by the user")
        self._initialise(self._skipped_by_load & set(self._unfilled))
        if self._unfilled:
            self.raise_unfilled(use)

    def raise_unfilled(self, use: str) -> NoReturn:
        names = list(self._unfilled)
        listed = "\n".join(f"  {name}" for name in names[:_MOST_NAMES])
        more = f"\n  … and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        raise UninitializedTensorError(
            f"{type(self._model()).__name__} cannot {use}: {len(names)} of its tensors were neither loaded nor "
            f"initialised:\n{listed}{more}\n{_THREE_WAYS}"
        )

    def settle(self, status: str, under: nn.Module | None = None) -> None:
        """Take note of the tensors that have been written since the last look."""
        with real_execution():
            done = [
                name
                for name, item in self._unfilled.items()
                if (under is None or item.owner is under or under is self._model()) and item.written()
            ]
        self._note(done, status)

    def initialise_rest(self) -> None:
        """Run the model's own recorded init for every tensor that nobody has written."""
        self.settle("written by the user")
        self._initialise(set(self._unfilled))

    def unfilled(self) -> list[Tensor]:
        """The tensors without values."""
        return [item.tensor for item in self._unfilled.values()]

    def _initialise(self, names: set[str]) -> None:
        items = [item for name, item in self._unfilled.items() if name in names]
        if not items:
            return
        slots = [item.entry.slot for item in items]
        plan = make_plan(slots, self._tapes, None, Wanted())
        tensors = [tensor for item in items if (tensor := item.now()) is not None]
        fill(plan, tensors, self._tapes, None, _AsTheyAreNow(self._placement), exact=False)
        self._note([slot.name for slot in slots], "initialised", make_report(plan, self._tapes, None).rows)

    def _note(self, names: Iterable[str], status: str, rows: Iterable[Row] = ()) -> None:
        origins = {row.name: row.origin for row in rows}
        model = self._model()
        report = _report_rows(model)
        for name in names:
            self._unfilled.pop(name, None)
            if name in report:
                report[name].status = status  # type: ignore[assignment]
                report[name].origin = origins.get(name, "")
        if not self._unfilled:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            if model is not None:
                _guards.pop(model, None)


def _report_rows(model: nn.Module | None) -> dict[str, Row]:
    return {} if model is None else {row.name: row for row in report_of(model).rows}


_guards: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()


def guards_of(model: nn.Module) -> list[Guard]:
    """The guards of ``model`` and of models built into it."""
    return [_guards[module] for module in model.modules() if module in _guards] if _guards else []


def allocate(model: nn.Module, placement: Placement) -> InitReport:
    """Give a recorded model memory without values, and guard it until they have come.

    What no checkpoint brings (non-persistent buffers, plain tensor attributes) gets the model's own init at once.
    """
    slots, tensors, tapes = survey(model)
    later = [slot.saved and slot.ref is not None for slot in slots]
    now = [position for position, waits in enumerate(later) if not waits]
    plan = make_plan([slots[position] for position in now], tapes, None, Wanted())
    owners = dict(named_modules(model))
    unfilled: list[_Unfilled] = []
    with real_execution():
        memory: dict[int, torch.UntypedStorage] = {}
        for slot, tensor, waits in zip(slots, tensors, later, strict=True):
            if waits:
                placement.put(slot, tensor, _room(slot, tapes, memory, placement.device(slot)))
                owner, _, attribute = slot.name.rpartition(".")
                entry = Entry(slot, Action.INIT)
                unfilled.append(_Unfilled(entry, owners[owner], attribute, tensor, tensor._version))
    report = fill(plan, [tensors[position] for position in now], tapes, None, placement, exact=False)
    waiting = make_report(Plan(tuple(item.entry for item in unfilled)), tapes, None)
    for row in waiting.rows:
        row.status, row.origin = "unfilled", ""
    report.rows += waiting.rows
    keep_report(model, report)
    if unfilled:
        _guards[model] = Guard(model, unfilled, tapes, placement)
    return report


def _room(
    slot: Slot, tapes: Mapping[int, Tape], memory: dict[int, torch.UntypedStorage], device: torch.device
) -> Tensor:
    """Memory for one tensor, shared where the recorded storage is, with the marks of the unfilled in it."""
    ref = slot.ref
    assert ref is not None
    storage = memory.get(ref.storage)
    if storage is None:
        room = torch.empty(tapes[ref.storage].storages[ref.storage].nbytes, dtype=torch.uint8, device=device)
        storage = memory[ref.storage] = room.untyped_storage()
    tensor = torch.empty(0, dtype=ref.dtype, device=device).set_(storage, ref.offset, ref.size, ref.stride)
    if tapes[ref.storage].covers(ref):
        _place_mark(tensor)
    return tensor
