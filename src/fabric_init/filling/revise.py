"""A plan that was made when the recorded block ended, brought up to what the user has done to the model since."""

from __future__ import annotations

from torch import nn

from fabric_init.filling.deferred import Overlaid, given_since, loaded_since, refuse_lost_writes
from fabric_init.filling.materialize import Prepared, survey
from fabric_init.filling.plan import Action, Entry, Plan, check_all_have_values, own_init


def revised(prepared: Prepared, model: nn.Module) -> Prepared:
    """The plan for ``model`` as it is today: as if it had been filled when the block ended, and changed afterwards.

    Tensors are known by identity, so modules may have been moved, wrapped or renamed. What the user has loaded, written
    or put into the model since stands; a recorded tensor of another block gets its own init.

    Raises:
        RecordingError: recorded tensors were written in place, without memory.
        UninitializedTensorError: a tensor that came since has neither values nor a recorded init.
    """
    refuse_lost_writes(model)
    slots, tensors, tapes = survey(model)
    planned = {id(tensor): entry for entry, tensor in zip(prepared.plan.entries, prepared.tensors, strict=True)}
    given, earlier = given_since(model), loaded_since(model)
    loaded = frozenset(earlier.keys()) if earlier is not None else frozenset()
    entries = []
    for slot, tensor in zip(slots, tensors, strict=True):
        over = next((name for name in slot.names if name in loaded), None)
        if over is not None and earlier is not None:
            entries.append(Entry(slot, Action.LOAD, (Overlaid.key(over),), earlier.spec(over)))
        elif slot.real and any(name in given for name in slot.names):
            entries.append(Entry(slot, Action.KEEP))
        elif (entry := planned.get(id(tensor))) is not None:
            entries.append(entry._replace(slot=slot))
        else:
            entries.append(Entry(slot, own_init(slot, tapes)))
    check_all_have_values(entries, tapes, prepared.reader)
    reader = prepared.reader
    if earlier is not None and reader is not None:
        reader = Overlaid(reader, earlier)
    plan = Plan(tuple(entries), prepared.plan.unexpected)
    return Prepared(plan, tensors, tapes, reader, prepared.exact)
