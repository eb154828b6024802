"""Check tied tensors before a fill: what several keys of a checkpoint bring is one tensor in the model."""

from __future__ import annotations

import torch

from fabric_init.checkpoints import CheckpointReader
from fabric_init.filling.values.loader import loader_for
from fabric_init.planning.checks.ties import check_values
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Plan
from fabric_init.planning.rank_loads import read_as
from fabric_init.recording.replay.replay import real_execution


def check_ties(plan: Plan, reader: CheckpointReader | None, placement: Placement) -> None:
    """Check, before memory is allocated, that tied tensors have one value in the checkpoint.

    Raises:
        CheckpointMismatchError: A tied tensor has different values under its keys.
    """
    if reader is not None:
        with torch.inference_mode(False), real_execution():
            loader_for(reader).check_ties(plan, placement)
            for entry in {id(each.made_of): each.made_of for each in plan.entries}.values():
                if entry is not None and len(entry.keys) > 1:
                    values = (read_as(reader, key, entry.slot.shape, None) for key in entry.keys)
                    check_values(reader.path, entry, values)
