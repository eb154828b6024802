"""Functions of torch, those that take memory past the dispatcher among them, on recorded tensors as on plain ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.recording.every_function import GROUPS, check
from tests.support.processes import run_to_the_end


@pytest.mark.sweep("memory")
@pytest.mark.parametrize("group", GROUPS)
def test_every_function_gives_the_same_as_plain_pytorch_or_an_error_of_ours(group: str) -> None:
    done = run_to_the_end([sys.executable, "-m", "tests.recording.every_function", group], seconds=1800)
    lines = done.output.splitlines()
    assert [line for line in lines if line.startswith("FAULT")] == []
    assert done.code == 0, lines[-3:]  # the last call has ended the process
    assert lines[-1] == "the end"


def _fails_on_subclasses(tensor: torch.Tensor) -> None:
    if type(tensor) is not torch.Tensor:
        raise ValueError("a subclass")


WRONG: dict[str, tuple[Callable[..., Any], str, int]] = {
    "another value": (lambda t: type(t) is torch.Tensor, "and not", 2),  # what waits is refused when it is compared
    "an error of somebody else": (_fails_on_subclasses, "ValueError: a subclass", 3),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_comparison_finds(kind: str) -> None:
    function, words, count = WRONG[kind]
    faults = list(check("function", function, "t"))
    assert len(faults) == count
    assert all(words in fault for fault in faults)
