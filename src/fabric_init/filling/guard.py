"""A tensor that has memory but no values cannot be used or saved.

Each module keeps the list of its own tensors that wait for values, and every read that matters passes a hook:
``forward`` and ``state_dict`` raise while anything under the module waits, ``load_state_dict`` takes note of what has
come. What waits hangs on the modules themselves, so parts can be taken out, replaced, copied and put into other models.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fabric_init.errors import UninitializedTensorError
from fabric_init.filling.fill import dtype_name, fill, make_report
from fabric_init.filling.marks import has_mark, is_float, is_mark, marked_elements, place_mark, version_of
from fabric_init.filling.materialize import survey
from fabric_init.filling.placement import Placement
from fabric_init.filling.plan import Action, Entry, Plan, Wanted, make_plan
from fabric_init.filling.report import Row, Status, keep_report
from fabric_init.filling.slots import Slot, named_modules
from fabric_init.recording.replay import real_execution
from fabric_init.recording.tape import Tape

_THREE_WAYS = (
    "Load them (fabric.load, fabric.load_raw or load_state_dict), or declare the load so that it is done for you "
    "(init_module(checkpoint=…)), or give them the model's own init (fabric.init_missing(model))."
)
_ATTRIBUTE = "_fabric_init_unfilled"


@dataclass(frozen=True)
class _Unfilled:
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
        found = marked_elements(now)
        if found is None:
            return changed or now is not self.tensor
        if changed:
            return by_load or not is_float(found) or not has_mark(found)
        return not (has_mark(found) if is_float(found) else is_mark(found))

    def changed(self, now: Tensor) -> bool:
        return now is self.tensor and version_of(now) != self.version


class _Waiting:
    """A module's own tensors that wait for values. Guards a deep copy too, and refuses to be pickled."""

    def __init__(self, module: nn.Module | None = None, items: Iterable[_Unfilled] = (), model: str = "") -> None:
        self.items = list(items)
        self.model = model  # the class of the model that was built
        self.everywhere: list[_Waiting] = [self]  # in all modules of that model
        self._module = None if module is None else weakref.ref(module)

    def refuse(self, use: str, others: Sequence[_Waiting] = ()) -> NoReturn:
        """Raise with the names of all that waits, here and elsewhere in the model: one round to mend it all."""
        for waiting in self.everywhere:
            waiting.settle()
        names = dict.fromkeys(item.slot.name for waiting in (*self.everywhere, *others) for item in waiting.items)
        listed = "\n".join(f"  {name}" for name in names)
        which = "one of its tensors was" if len(names) == 1 else f"{len(names)} of its tensors were"
        raise UninitializedTensorError(
            f"{self.model} cannot {use}: {which} neither loaded nor initialised:\n{listed}\n" + _THREE_WAYS
        )

    def settle(self) -> None:
        module = None if self._module is None else self._module()
        if module is not None:
            _settle(module, self, "written by the user")

    def before_load(self) -> None:
        """What was written until now is not this load's doing."""
        self.settle()
        module = None if self._module is None else self._module()
        if module is not None:
            now = [(item, getattr(module, item.attribute, None)) for item in self.items]
            self.items = [item if t is None else replace(item, tensor=t, version=version_of(t)) for item, t in now]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Waiting:
        return _Waiting(None, (replace(item, tensor=None) for item in self.items), self.model)

    def __reduce__(self) -> tuple[type[_Waiting], tuple[()]]:
        self.settle()
        if self.items:
            self.refuse("be pickled")
        return _Waiting, ()


def _waiting_under(model: nn.Module) -> Iterator[tuple[nn.Module, _Waiting]]:
    for module in model.modules():
        waiting = vars(module).get(_ATTRIBUTE)
        if waiting is not None:
            yield module, waiting


# -- what hooks do -----------------------------------------------------------------------------------------------------


def _before_forward(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        _check_outside_the_graph(module)
    else:
        _check_forward(module)


def _check_forward(module: nn.Module) -> None:
    require(module, "run")
    _unhook(module)


def _check_outside_the_graph(module: nn.Module) -> None:
    torch.compiler.disable(_check_forward)(module)


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    require(module, "be saved")
    _unhook(module, running=module._state_dict_pre_hooks)


class _Load(threading.local):
    """The call of ``load_state_dict`` that this thread is in."""

    errors: Any = None  # its list of error messages, which goes through the whole call and tells it from another
    top: nn.Module | None = None  # the outermost guarded module that it reaches
    waiting = 0  # how many tensors waited under that before


_load = _Load()


def _before_load(
    module: nn.Module,
    state_dict: Any,
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: Any,
    unexpected_keys: Any,
    error_msgs: Any,
) -> None:
    waiting = vars(module).get(_ATTRIBUTE)
    if waiting is not None:
        waiting.before_load()
    if _load.errors is not error_msgs:
        _load.errors, _load.top = error_msgs, module
        _load.waiting = sum(len(waiting.items) for _, waiting in _waiting_under(module))


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    waiting = vars(module).get(_ATTRIBUTE)
    if waiting is not None:
        _settle(module, waiting, "loaded")
    if _load.top is not module:
        return
    before, _load.errors, _load.top = _load.waiting, None, None
    left = [(owner, item) for owner, waiting in _waiting_under(module) for item in waiting.items]
    if 0 < len(left) < before:
        # What a load does not bring keeps the model's own init, as in plain PyTorch, also where a strict load raises.
        # A load that brought nothing of what waits (another prefix, an adapter alone) completes nothing.
        _initialise([(owner, item) for owner, item in left if not item.tape.never_written(_ref(item))])
        for owner, waiting in list(_waiting_under(module)):
            _settle(owner, waiting, "initialised")
    if not any(True for _ in _waiting_under(module)):
        _unhook(module, running=module._load_state_dict_post_hooks)


def _hook(module: nn.Module) -> None:
    if _before_forward not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_before_forward)
        module.register_state_dict_pre_hook(_before_state_dict)
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)


def _unhook(model: nn.Module, running: Any = None) -> None:
    """Take the hooks off ``model`` and all in it.

    Of hooks that are ``running``, torch allows taking off the last alone; where ours is not, the next forward does it.
    """
    for module in model.modules():
        tables: tuple[Any, ...] = (
            module._forward_pre_hooks,
            module._state_dict_pre_hooks,
            module._load_state_dict_pre_hooks,
            module._load_state_dict_post_hooks,
        )
        if any(table is running and not _is_ours(table[next(reversed(table))]) for table in tables):
            continue
        for table in tables:
            for key in [key for key, hook in table.items() if _is_ours(hook)]:
                del table[key]


def _is_ours(hook: Any) -> bool:
    # torch keeps a hook that runs before loading in a wrapper
    return getattr(hook, "hook", hook) in (_before_forward, _before_state_dict, _before_load, _after_load)


# -- what Fabric calls -------------------------------------------------------------------------------------------------


def require(model: nn.Module, use: str) -> None:
    """Raise unless every tensor under ``model`` has its values.

    Raises:
        UninitializedTensorError: naming every tensor without values, and the ways to give it some.
    """
    settle(model)
    under = [waiting for _, waiting in _waiting_under(model)]
    if under:
        under[0].refuse(use, under)


def settle(model: nn.Module) -> list[Row]:
    """Take note of what has been written since the last look; gives the report's rows of what still waits."""
    for module, waiting in list(_waiting_under(model)):
        _settle(module, waiting, "written by the user")
    return [item.row for _, waiting in _waiting_under(model) for item in waiting.items]


def release(model: nn.Module) -> None:
    """Take the guard's hooks off a model in which nothing waits. Not to be called from one of torch's hooks."""
    if not any(True for _ in _waiting_under(model)):
        _unhook(model)


def initialise_rest(model: nn.Module) -> None:
    """Run the model's own recorded init for every tensor under ``model`` that still waits.

    Raises:
        UninitializedTensorError: the model's own code never gives some tensor a value.
    """
    settle(model)
    waits = [(module, item) for module, waiting in _waiting_under(model) for item in waiting.items]
    partly = [item.slot.name for module, item in waits if item.changed(getattr(module, item.attribute))]
    if partly:
        raise UninitializedTensorError(
            f"the model's own init would overwrite what was written into a part of {', '.join(partly)}. Call "
            "fabric.init_missing(model) first and write afterwards, or write the whole tensor."
        )
    _initialise(waits)
    for module, waiting in list(_waiting_under(model)):
        _settle(module, waiting, "initialised")
    release(model)


def _settle(module: nn.Module, waiting: _Waiting, status: Status) -> None:
    with real_execution():
        left = []
        for item in waiting.items:
            now = getattr(module, item.attribute, None)
            if not item.written(now, by_load=status == "loaded"):
                left.append(item)
            elif item.row.status == "unfilled":
                item.row.status = status
                item.row.dtype = item.row.dtype if now is None else dtype_name(now.dtype)
    waiting.items = left
    if not left:
        vars(module).pop(_ATTRIBUTE, None)


def _initialise(waiting: Sequence[tuple[nn.Module, _Unfilled]]) -> None:
    by_tensor = {id(tensor := getattr(module, item.attribute)): (item, tensor) for module, item in waiting}
    items = [item for item, _ in by_tensor.values()]
    if not items:
        return
    tapes = {_ref(item).storage: item.tape for item in items}
    plan = make_plan([item.slot for item in items], tapes, None, Wanted())
    tensors = [tensor for _, tensor in by_tensor.values()]
    report = fill(plan, tensors, tapes, None, _AsTheyAreNow(items[0].placement), exact=False)
    for item, tensor, row in zip(items, tensors, report.rows, strict=True):
        item.row.status, item.row.origin, item.row.dtype = "initialised", row.origin, dtype_name(tensor.dtype)


def _ref(item: _Unfilled) -> Any:
    assert item.slot.ref is not None
    return item.slot.ref


class _AsTheyAreNow:
    """A placement for tensors that may have been moved, cast or laid out anew since they were given memory."""

    def __init__(self, placement: Placement) -> None:
        self.device = placement.device
        self.region = placement.region

    def put(self, slot: Slot, tensor: Tensor, value: Tensor) -> Tensor:
        tensor.detach().copy_(value)  # in place: layout, views and ties stay
        return tensor


# -- memory without values ---------------------------------------------------------------------------------------------


def allocate(models: Sequence[nn.Module], placement: Placement) -> None:
    """Give recorded models memory without values, and guard them until those have come.

    What no checkpoint brings (non-persistent buffers, plain tensor attributes) gets the model's own init at once.
    Models of one call may share tensors.
    """
    placed: dict[int, int] = {}
    memory: dict[int, torch.UntypedStorage] = {}
    plans = []
    for model in models:
        slots, tensors, tapes = survey(model)
        both = list(zip(slots, tensors, strict=True))
        later = [(slot, tensor) for slot, tensor in both if _waits(slot, tapes)]
        now = [(slot, tensor) for slot, tensor in both if not _waits(slot, tapes)]
        plans.append((model, later, now, tapes, make_plan([slot for slot, _ in now], tapes, None, Wanted())))
    for model, later, now, tapes, plan in plans:
        with real_execution():
            for slot, tensor in later:
                if id(tensor) not in placed:
                    placement.put(slot, tensor, _room(slot, tapes, memory, placement.device(slot)))
                    placed[id(tensor)] = version_of(tensor)
        report = fill(plan, [tensor for _, tensor in now], tapes, None, placement, exact=False)
        rows = make_report(Plan(tuple(Entry(slot, Action.INIT) for slot, _ in later)), tapes, None).rows
        report.rows += rows
        keep_report(model, report)
        _guard(model, later, rows, tapes, placement, placed)


def _waits(slot: Slot, tapes: Mapping[int, Tape]) -> bool:
    if not slot.saved or slot.ref is None:
        return False
    # no mark can be put into bools: they get the model's own init at once, where it has one
    return slot.dtype != torch.bool or tapes[slot.ref.storage].never_written(slot.ref)


def _guard(
    model: nn.Module,
    unfilled: Sequence[tuple[Slot, Tensor]],
    rows: Sequence[Row],
    tapes: Mapping[int, Tape],
    placement: Placement,
    versions: Mapping[int, int],
) -> None:
    owners = dict(named_modules(model))
    everywhere: list[_Waiting] = []
    for (slot, tensor), row in zip(unfilled, rows, strict=True):
        row.status, row.origin = "unfilled", ""
        assert slot.ref is not None
        for name in slot.names:  # under each: a tie may be used through any of its modules
            prefix, _, attribute = name.rpartition(".")
            owner = owners[prefix]
            waiting = vars(owner).setdefault(_ATTRIBUTE, _Waiting(owner, model=type(model).__name__))
            if waiting.everywhere is not everywhere:
                everywhere.append(waiting)
                waiting.everywhere = everywhere
            if all(item.attribute != attribute for item in waiting.items):
                waiting.items.append(
                    _Unfilled(attribute, slot, tapes[slot.ref.storage], placement, row, tensor, versions[id(tensor)])
                )
    if unfilled:
        for module in owners.values():  # all: a parent may use its child's weight without calling the child
            _hook(module)


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
    place_mark(tensor)
    return tensor
