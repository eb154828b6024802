"""Refuse a load that brings other values than those by which the model's own code has decided something.

``.item()``, ``.tolist()``, ``if`` and the like show values to Python, and what it makes of them is a constant in the
model. So what Python has seen is computed again, from the values in the checkpoint, and has to be the same. ``assert
not weight.isnan().any()`` finds what it has found; clusters of weights that were drawn are not those of the weights in
the file. A value into which no random number went is the model's own choice, and may differ: the flag of a new model
that says "not initialized yet", for example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fabric_init.errors import CheckpointMismatchError, FabricInitError
from fabric_init.filling.values.loaded_memory import LoadedMemory
from fabric_init.planning.derived import loaded_storages
from fabric_init.planning.plan import Plan
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.recording.replay.replay import as_recorded, real_execution, seen_in
from fabric_init.recording.tape.liveness import is_final, live_ops
from fabric_init.recording.tape.tape import Tape, ValueRead


def check_decisions(prepared: PreparedPlan) -> None:
    """Check that Python would have seen the same, had the tensors had the values that the plan loads.

    Raises:
        CheckpointMismatchError: It would not; the message names a tensor, and the line that looked.
    """
    plan, _, tapes, reader, exact, *_ = prepared
    all_tapes = list({tape.current(): None for tape in tapes.values()})
    if reader is None or not any(tape.value_reads for tape in all_tapes):
        return
    loaded = loaded_storages(plan, tapes)
    for tape in all_tapes:
        here = LoadedMemory(tape, loaded, reader, as_recorded, exact=exact)
        of_load = {storage for storage in loaded if storage in tape.storages}
        for look, replaced in _looked_at(tape, of_load):
            before = seen_in(tape, look, here.without(of_load - _known(tape, look, of_load)), exact=exact)
            if not _is_seen(before, tape, look, here, exact=exact):
                keys = {each.key for storage in replaced for each in loaded[storage]}
                raise CheckpointMismatchError(_message(plan, look, keys))


def _looked_at(tape: Tape, loaded: Collection[int]) -> Iterator[tuple[ValueRead, set[int]]]:
    """Yield looks at what a load replaces, with the storages in question: they were drawn by the model's own init.

    A line that has also seen a value that the init itself has replaced since is a part of that init: it draws until
    all values lie between some bounds, say.
    """
    read = [(look, _read(tape, look, set(loaded) - _known(tape, look, loaded))) for look in tape.value_reads]
    of_init = {
        (look.source, storage)
        for look, reads in read
        for storage, number in reads
        if not is_final(tape, storage, number)
    }
    for look, reads in read:
        final = {storage for storage, number in reads if is_final(tape, storage, number)}
        replaced = {s for s in final if (look.source, s) not in of_init and _is_drawn(tape, s)}
        if replaced:
            yield look, replaced


def _known(tape: Tape, look: ValueRead, loaded: Collection[int]) -> set[int]:
    """Return which of the storages had the values of the checkpoint already: an earlier block has declared the load."""
    return {storage for storage in loaded if storage in tape.loaded and tape.loaded[storage].since < look.number}


def _read(tape: Tape, look: ValueRead, loaded: Collection[int]) -> set[tuple[int, int]]:
    """Return which of the storages ``loaded`` had a part in what was seen, each with the number of its reader."""
    read = {(ref.storage, look.number) for ref in look.refs()}
    computed = [s for s, number in read if s not in loaded or not is_final(tape, s, number)]
    for number in live_ops(tape, computed, exact=False, before=look.number, inputs=loaded):
        read |= {(ref.storage, number) for ref in tape.ops[number].reads()}
    return {(storage, number) for storage, number in read if storage in loaded}


def _is_drawn(tape: Tape, storage: int) -> bool:
    return any(tape.ops[number].draw is not None for number in live_ops(tape, [storage], exact=False))


def _is_seen(wanted: Sequence[Any], tape: Tape, look: ValueRead, values: LoadedMemory, *, exact: bool) -> bool:
    try:
        return all(map(_same, wanted, seen_in(tape, look, values, exact=exact)))
    except FabricInitError:
        raise
    except (RuntimeError, IndexError, ValueError):  # the model's own code would have failed
        return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        with real_execution():
            return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return bool(one == other or (one != one and other != other))


def _message(plan: Plan, look: ValueRead, keys: set[str]) -> str:
    names = [entry.slot.name for entry in plan.plain if not keys.isdisjoint(entry.keys)]
    site = "" if look.source is None else f" ({look.source})"
    return (
        f"the model's own code has looked at values that were computed from {names[0]}{site}, which was drawn at "
        "random then, and the checkpoint brings others, for which that code would have done something else. Load the "
        "checkpoint before that code runs: build the model in one init_module block, and change it in another. If what "
        "the code saw does not matter, build with empty_init=True and call load_state_dict after the block."
    )
