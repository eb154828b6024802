"""Prepare a plan: the plan for one model, with what is needed to execute it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from fabric_init.checkpoints import CheckpointReader, rename_keys
from fabric_init.checkpoints.state_dicts import CHECKPOINT_WRAPPER
from fabric_init.errors import CheckpointMismatchError, RecordingError
from fabric_init.planning.checks.undone_changes import check_nothing_is_undone
from fabric_init.planning.hints.quantized import quantized_refusal
from fabric_init.planning.make_plan import make_plan
from fabric_init.planning.plan import Action, LoadOptions, Plan
from fabric_init.planning.recorded_load.choice import load_code
from fabric_init.planning.recorded_load.record import RecordedLoad, record_load
from fabric_init.planning.tensors import Walk, Walked, plain_name, registered_tensors, tensors_and_tapes, walked
from fabric_init.recording.tape.tape import Rng, Tape
from fabric_init.recording.tensor.wrappers import is_sharded, is_wrapper


class PreparedPlan(NamedTuple):
    """A plan for one model, and what is needed to execute it. ``exact`` replays in order, for ``rng="eager"``."""

    plan: Plan
    tensors: list[Tensor]
    tapes: Mapping[int, Tape]
    reader: CheckpointReader | None
    exact: bool
    versions: Sequence[tuple[Tensor, int]] = ()
    """Of the tensors that had values when the plan was made: how often they had been written."""
    undo: Callable[[], None] | None = None
    """Take back what load code has done to the modules."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedPlan:
        """Return the plan itself: a copy of a module that has it is made of tensors that are computed from its own."""
        return self


def plan_for(
    model: Walked, reader: CheckpointReader | None, options: LoadOptions, rng: Rng | None = None
) -> PreparedPlan:
    """Return the plan for ``model``, whose tensors are still recorded and not sharded.

    Raises:
        FabricInitError: Anything that the user has to fix; no memory is allocated before.
    """
    walk = walked(model)
    if reader is not None:
        _refuse_lazy(walk)
        options = _through_wrappers(walk, options)
        load = _load(walk, reader, options)
        if load is not None:
            try:
                return _plan(Walk(walk.model), load.reader, options, rng, load)._replace(undo=load.undo)
            except BaseException:
                load.undo()
                raise
    return _plan(walk, reader, options, rng, None)


def _through_wrappers(walk: Walk, options: LoadOptions) -> LoadOptions:
    """Return ``options`` by which names are found that ``torch.compile`` and ``checkpoint_wrapper`` have lengthened.

    A checkpoint has the name from before or the one that ``state_dict`` gives, which shows compiled modules alone.
    """
    names = [name for name, _, _ in registered_tensors(walk)]
    longer = {plain_name(name): name.replace(CHECKPOINT_WRAPPER, "") for name in names}
    if all(name == plain for plain, name in longer.items()):
        return options
    rules = options.rename if isinstance(options.rename, Sequence) else [options.rename] if options.rename else []
    return replace(options, rename=[*rules, lambda name: longer.get(plain_name(name), name)])


def load_with_code(model: Walked, reader: CheckpointReader, options: LoadOptions) -> RecordedLoad | None:
    """Run the load code of ``model`` on a checkpoint; ``None`` if it has none that would make a difference.

    Raises:
        FabricInitError: Anything that the user has to fix. The modules are as they were then.
    """
    names = rename_keys((*reader.keys(), *reader.extra_state), options.rename)
    walk = walked(model)
    code = load_code(walk, reader, names, options.reinit)
    if code is None:
        return None

    def again(other: CheckpointReader, changed: LoadOptions) -> RecordedLoad | None:
        load = load_with_code(walk.model, other, changed)
        if load is not None:
            load.undo()
        return load

    load = record_load(walk.model, reader, names, code, _mode(tensors_and_tapes(walk)[2].values()))
    return load._replace(again=again)


def _load(walk: Walk, reader: CheckpointReader, options: LoadOptions) -> RecordedLoad | None:
    """Run the load code of a model; if it fails because weights are quantized, the error says so."""

    def again(other: CheckpointReader) -> None:
        load = load_with_code(walk.model, other, options)
        try:
            _plan(Walk(walk.model), other if load is None else load.reader, options, None, load)
        finally:
            if load is not None:
                load.undo()

    try:
        return load_with_code(walk, reader, options)
    except CheckpointMismatchError:
        refusal = quantized_refusal(reader, again)
        if refusal is None:
            raise
    raise CheckpointMismatchError(refusal)


def _plan(
    model: Walk, reader: CheckpointReader | None, options: LoadOptions, rng: Rng | None, load: RecordedLoad | None
) -> PreparedPlan:
    slots, tensors, tapes = tensors_and_tapes(model)
    exact = _exact(set(tapes.values()), rng)
    plan = make_plan(slots, tapes, reader, options, load)
    check_nothing_is_undone(plan.entries, tapes)
    _refuse_loading_wrappers(plan, tensors, reader)
    versions = [
        (tensor, tensor._version)
        for info, tensor in zip(slots, tensors, strict=True)
        if info.real and not tensor.is_inference()
    ]
    return PreparedPlan(plan, tensors, tapes, reader, exact, versions)


def _refuse_loading_wrappers(plan: Plan, tensors: Sequence[Tensor], reader: CheckpointReader | None) -> None:
    """Raise if a tensor of a checkpoint is for a wrapper that has values, whose class would have to take them in.

    Raises:
        CheckpointMismatchError: It is.
    """
    for entry, tensor in zip(plan.entries, tensors, strict=True):
        if entry.action is Action.LOAD and is_wrapper(tensor) and not is_sharded(tensor):
            assert reader is not None
            raise CheckpointMismatchError(
                f"{reader.path} has {entry.keys[0]}, which in the model is a {type(tensor).__name__} with values. "
                "Record that, too: make it in the block, or after it of a tensor that waits for its values."
            )


def _refuse_lazy(walk: Walk) -> None:
    for name, _, tensor in walk.registered:
        if is_lazy(tensor):
            prefix = name.rpartition(".")[0]
            raise RecordingError(
                f"{prefix or 'the model'} ({type(walk.model.get_submodule(prefix)).__name__}) is lazy: its tensors "
                "have no shape before it has seen a batch, so no load can be planned for it. Run a batch through it in "
                "the block, or build the model with init_module(empty_init=True) and call load_state_dict."
            )


def _exact(tapes: set[Tape], rng: Rng | None) -> bool:
    mode = rng or _mode(tapes)
    for tape in tapes:
        if tape.sealed_rng not in (None, mode):
            raise RecordingError(
                f"rng={mode!r}, but the constructor has read random values that were drawn with "
                f"rng={tape.sealed_rng!r} (through .item(), .tolist() or the like). "
                f"Record with deferred_init(rng={mode!r})."
            )
    return mode == "eager"


def _mode(tapes: Iterable[Tape]) -> Rng:
    """Return the mode of a model on these tapes: that of all, or else the one that needs no common order."""
    return "eager" if {tape.rng for tape in tapes} == {"eager"} else "per_op"
