"""Lightning's own loads after ``setup``, on every strategy, and ``load_state_dict`` of what the user has read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_init import Fabric
from tests.idioms.setups import ON_RANKS, Files, Found, Idiom, check, tried
from tests.support.ranks import run_ranks


def load(fabric: Fabric, model: Any, files: Files) -> None:
    assert fabric.load(files.state, {"model": model}) == {}


def load_raw(fabric: Fabric, model: Any, files: Files) -> None:
    fabric.load_raw(files.raw, model)


def load_raw_of_a_part(fabric: Fabric, model: Any, files: Files) -> None:
    fabric.load_raw(files.part, model, strict=False)


def load_state_dict(fabric: Fabric, model: Any, files: Files) -> None:
    model.load_state_dict(torch.load(files.raw, mmap=True))


def load_state_dict_of_a_part(fabric: Fabric, model: Any, files: Files) -> None:
    model.load_state_dict(torch.load(files.part), strict=False)


IDIOMS = {
    "load": Idiom(load),
    "load_raw": Idiom(load_raw),
    "load_raw of a part": Idiom(load_raw_of_a_part, is_partial=True),
    "load_state_dict": Idiom(load_state_dict),
    "load_state_dict of a part": Idiom(load_state_dict_of_a_part, is_partial=True),
}


def on_this_rank(setup: str, files: Files) -> dict[str, Found]:
    return tried(setup, IDIOMS, files)


@pytest.mark.parametrize("setup", ON_RANKS)
def test_lightnings_loads_fill_the_model_on_two_ranks(setup: str, files: Files) -> None:
    check(setup, IDIOMS, files, run_ranks(2, on_this_rank, setup=setup, files=files))


def test_lightnings_loads_fill_the_model_on_one_device(files: Files) -> None:
    check("one device", IDIOMS, files, [on_this_rank("one device", files)])
