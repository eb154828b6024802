"""``torch.distributed.checkpoint`` reads into the tensors of a model's state dict, each rank its own parts.

Its functions for state dicts do not see through what Lightning puts around a model, so they get the model in it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from fabric_init import Fabric
from tests.idioms.setups import ONE_AFTER_THE_OTHER, Files, Found, Idiom, check, tried
from tests.support.ranks import run_ranks
from tests.support.zoo import inner


def into_its_tensors(fabric: Fabric, model: Any, files: Files) -> None:
    dcp.load(model.state_dict(), checkpoint_id=files.dcp)


def into_its_tensors_and_set(fabric: Fabric, model: Any, files: Files) -> None:
    state = model.state_dict()
    dcp.load(state, checkpoint_id=files.dcp)
    model.load_state_dict(state)


def model_state_dict(fabric: Fabric, model: Any, files: Files) -> None:
    state = get_model_state_dict(inner(model))
    dcp.load(state, checkpoint_id=files.dcp)
    set_model_state_dict(inner(model), state)


def nested(fabric: Fabric, model: Any, files: Files) -> None:
    state = {"model": get_model_state_dict(inner(model))}
    dcp.load(state, checkpoint_id=files.nested_dcp)
    set_model_state_dict(inner(model), state["model"])


def hugging_face(fabric: Fabric, model: Any, files: Files) -> None:
    state = get_model_state_dict(inner(model))
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(files.hugging_face)))
    set_model_state_dict(inner(model), state)


def full(fabric: Fabric, model: Any, files: Files) -> None:
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(inner(model), torch.load(files.raw, mmap=True), options=options)


def full_from_rank_zero(fabric: Fabric, model: Any, files: Files) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = torch.load(files.raw, mmap=True) if dist.get_rank() == 0 else {}
    set_model_state_dict(inner(model), state, options=options)


def part(fabric: Fabric, model: Any, files: Files) -> None:
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(inner(model), torch.load(files.part), options=options)


IDIOMS = {
    "into its tensors": Idiom(into_its_tensors, writes=True),
    "into its tensors, and set": Idiom(into_its_tensors_and_set, writes=True),
    "model_state_dict": Idiom(model_state_dict, writes=True),
    "nested": Idiom(nested, writes=True),
    "Hugging Face": Idiom(hugging_face, writes=True),
    "full": Idiom(full),
    "part": Idiom(part, is_partial=True),
}
ON_RANKS = IDIOMS | {"full, from rank 0": Idiom(full_from_rank_zero, writes=True)}


def on_this_rank(setup: str, files: Files) -> dict[str, Found]:
    return tried(setup, ON_RANKS, files)


@pytest.mark.parametrize("setup", ONE_AFTER_THE_OTHER)
def test_dcp_fills_the_model_on_two_ranks(setup: str, files: Files) -> None:
    check(setup, ON_RANKS, files, run_ranks(2, on_this_rank, setup=setup, files=files))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_fills_the_model_on_one_device(files: Files) -> None:
    check("one device", IDIOMS, files, [tried("one device", IDIOMS, files)])
