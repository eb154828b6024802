"""``to_empty`` before a load, as for models on meta: what waits has no memory to lose, and waits on.

As on meta, code that calls it has to fill buffers that no checkpoint brings by itself.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from fabric_init import Fabric, UninitializedTensorError
from tests.idioms.setups import ONE_AFTER_THE_OTHER, Files, Found, Idiom, check, tried
from tests.support.ranks import run_ranks
from tests.support.zoo import inner, tokens


def emptied(model: Any) -> None:
    """``to_empty``, and the buffers as torchtitan's ``init_weights`` computes them."""
    model.to_empty(device="cpu")
    with pytest.raises(UninitializedTensorError):
        model(tokens(0))
    with torch.no_grad():
        inner(model).inv_freq.copy_(1.0 / (100 ** (torch.arange(0, 8, 2).float() / 8)))
        for layer in inner(model).layers:
            layer.scale.fill_(1 / math.sqrt(8))


def load_state_dict(fabric: Fabric, model: Any, files: Files) -> None:
    emptied(model)
    model.load_state_dict(torch.load(files.raw))


def dcp_load(fabric: Fabric, model: Any, files: Files) -> None:
    emptied(model)
    dcp.load(model.state_dict(), checkpoint_id=files.dcp)


def dcp_load_and_set(fabric: Fabric, model: Any, files: Files) -> None:
    emptied(model)
    state = get_model_state_dict(inner(model))
    dcp.load(state, checkpoint_id=files.dcp)
    set_model_state_dict(inner(model), state)


IDIOMS = {
    "load_state_dict": Idiom(load_state_dict, keeps_parameters=False),
    "dcp.load": Idiom(dcp_load, keeps_parameters=False, writes=True),
    "dcp.load, and set": Idiom(dcp_load_and_set, keeps_parameters=False, writes=True),
}


def on_this_rank(setup: str, files: Files) -> dict[str, Found]:
    return tried(setup, IDIOMS, files)


@pytest.mark.parametrize("setup", ONE_AFTER_THE_OTHER)
def test_an_emptied_model_can_be_loaded_on_two_ranks(setup: str, files: Files) -> None:
    check(setup, IDIOMS, files, run_ranks(2, on_this_rank, setup=setup, files=files))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_emptied_model_can_be_loaded_on_one_device(files: Files) -> None:
    check("one device", IDIOMS, files, [on_this_rank("one device", files)])
