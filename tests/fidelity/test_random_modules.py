"""Whatever a constructor is put together from, recording and replaying it gives what plain PyTorch gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fabric_init import deferred_init
from fabric_init.api import materialize
from tests.support.identity import compare, differences, first_names, tensors_of
from tests.support.programs import STEPS, Built

Program = list[tuple[str, int]]
PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 1 << 16)), min_size=1, max_size=10)
PROFILE = settings(
    settings.get_profile("random models"),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=120,
)
VARIANTS_PER_STEP = 8


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded(program: Program, seed: int) -> Built:
    torch.manual_seed(seed)
    with deferred_init(rng="per_op"):
        return Built(program)


def filled(program: Program, seed: int, workers: int = 1) -> Built:
    model = recorded(program, seed)
    with threads(workers):
        materialize(model)
    return model


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_step_alone_is_bit_identical_to_eager(name: str) -> None:
    for seed in range(VARIANTS_PER_STEP):
        verdict = compare(lambda seed=seed: Built([(name, seed)]), seed)
        assert verdict.tensors > 0
        assert not verdict.differences, f"step {name}, arguments' seed {seed}: {verdict.differences}"


@given(program=PROGRAMS, seed=st.integers(0, 1 << 40))
@example(program=[("rewinds", 1), ("seeds", 2), ("forks", 3), ("rewinds", 4)], seed=0)
@PROFILE
def test_random_modules_are_bit_identical_to_eager(program: Program, seed: int) -> None:
    assert compare(lambda: Built(program), seed).differences == []


@given(program=PROGRAMS, seed=st.integers(0, 1 << 40), kept=st.sets(st.integers(0, 40)))
@PROFILE
def test_per_op_values_do_not_depend_on_threads_or_on_what_is_loaded(
    program: Program, seed: int, kept: set[int]
) -> None:
    model = filled(program, seed)
    assert differences(model, filled(program, seed)) == [], "a second time"
    assert differences(model, filled(program, seed, workers=2)) == [], "on two threads"

    memory: dict[int, int] = {}
    for tensor in {id(tensor): tensor for tensor in tensors_of(model).values()}.values():
        address = tensor.untyped_storage().data_ptr()
        memory[address] = memory.get(address, 0) + 1
    alone = [
        name for name, t in first_names(model).items() if t.numel() and memory[t.untyped_storage().data_ptr()] == 1
    ]
    loaded = {name for position, name in enumerate(alone) if position in kept}
    if not loaded:
        return
    other = recorded(program, seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "some.pt"
        # what init would give: tensors that the constructor computes from loaded ones follow these
        torch.save({name: first_names(model)[name].detach().clone() for name in loaded}, path)
        report = materialize(other, checkpoint=path, strict=False)
    assert {row.name for row in report.rows if row.status == "loaded"} == loaded
    assert differences(model, other) == [], f"with {sorted(loaded)} loaded"


def test_the_steps_cover_all_of_torch_nn_init() -> None:
    fills = {
        name
        for name, function in vars(torch.nn.init).items()
        if callable(function) and name.endswith("_") and not name.startswith("_")
    }
    assert fills <= STEPS.keys(), fills - STEPS.keys()
