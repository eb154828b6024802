"""The report names the model's own line, whichever way the init function was reached."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.init import kaiming_normal_, orthogonal_, trunc_normal_, xavier_uniform_

from fabric_init import deferred_init
from fabric_init.api import materialize
from fabric_init.recording.tensor.recorded_tensor import recorded

HERE = Path(__file__).name


def line() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def origin(model: nn.Module, name: str) -> str:
    return next(row.origin for row in materialize(model).rows if row.name == name)


WAYS: dict[str, Callable[[torch.Tensor], int]] = {
    "nn.init.normal_": lambda w: (nn.init.normal_(w, std=0.02), line())[1],
    "nn.init.xavier_uniform_": lambda w: (nn.init.xavier_uniform_(w), line())[1],
    "captured xavier_uniform_": lambda w: (xavier_uniform_(w), line())[1],
    "captured trunc_normal_": lambda w: (trunc_normal_(w, std=0.02), line())[1],
    "captured kaiming_normal_": lambda w: (kaiming_normal_(w), line())[1],
    "captured orthogonal_": lambda w: (orthogonal_(w), line())[1],
    "functools.partial": lambda w: (functools.partial(nn.init.constant_, val=2.0)(w), line())[1],
    "w.data.normal_": lambda w: (w.data.normal_(), line())[1],
    "w.data.copy_": lambda w: (w.data.copy_(torch.randn(4, 4)), line())[1],
    "w.data.mul_": lambda w: (w.data.mul_(2), line())[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_line_of_the_models_own_code_is_named(way: str) -> None:
    at: list[int] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            at.append(WAYS[way](self.weight))

    with deferred_init():
        model = Model()
    assert origin(model, "weight").endswith(f"{HERE}:{at[0]}")


def test_what_torchs_own_layers_do_is_attributed_to_the_line_that_made_the_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.line = nn.Linear(3, 3), line()

    with deferred_init():
        model = Model()
    text = origin(model, "layer.weight")
    assert text.startswith("kaiming_uniform_(a=2.23607) at ")
    assert text.endswith(f"{HERE}:{model.line}")


def test_rules_keep_their_arguments() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 3))
            nn.init.trunc_normal_(self.weight, std=0.02)

    with deferred_init():
        model = Model()
    text = origin(model, "weight")
    assert text.startswith("trunc_normal_(")
    assert "std=0.02" in text


def test_a_deep_copy_is_attributed_to_the_rule_that_made_the_original() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.original, self.line = nn.Linear(3, 3), line()
            self.copy = copy.deepcopy(self.original)

    with deferred_init():
        model = Model()
    text = origin(model, "copy.weight")
    assert text.startswith("kaiming_uniform_")
    assert text.endswith(f"{HERE}:{model.line}")


def test_a_line_that_only_builds_one_of_torchs_modules_is_distinguished_from_one_that_initializes() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)

    def sources(tensor: torch.Tensor) -> list[bool]:
        recording = recorded(tensor)
        assert recording is not None
        ops = [recording.tape.ops[number] for number in recording.tape.writers[recording.storage]]
        return [op.source.constructed for op in ops if op.source is not None]

    with deferred_init():
        built, own, norm = nn.Linear(3, 3), Own(), nn.BatchNorm1d(3)
        built.reset_parameters()
        nn.init.zeros_(own.weight)
    assert sources(built.weight) == [True, False]
    assert sources(own.weight) == [True, False]
    assert sources(norm.get_buffer("running_mean"))[0] is True


def test_the_caller_of_a_wrapper_around_an_init_function_is_named() -> None:
    at: list[int] = []

    def copy_(tensor: torch.Tensor, other: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(other * 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))
            at.append((copy_(self.weight, torch.ones(3)), line())[1])

    with deferred_init():
        model = Model()
    assert origin(model, "weight").endswith(f"{HERE}:{at[0]}")
