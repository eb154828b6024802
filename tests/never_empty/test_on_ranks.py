"""The same on two ranks: no way of touching what a rank holds of a model that waits gives a value."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fabric_init import Fabric
from tests.never_empty.outcomes import REFUSED, outcome_again
from tests.never_empty.targets import SIZE, Target
from tests.never_empty.ways import COPIES, OPERATORS, VALUES, WRITES_OF_REAL_TENSORS, Case, Way, X
from tests.support.ranks import run_ranks
from tests.support.zoo import launch
from tests.test_never_empty import poisoned_memory

RANKS = 2
LOCAL_WAYS: dict[str, Way] = {**OPERATORS, **WRITES_OF_REAL_TENSORS, **VALUES, **COPIES}
STAYS_RECORDED = {"mul_ in place", "clamp_ in place", "nan_to_num_ in place", "SGD", "AdamW", "Adam without foreach"}
"""Ways that write in place what is refused afterwards: the write is on the tape, so the values are others."""


class Wide(Target):
    """A parameter of which two ranks hold ``SIZE`` rows each, and a persistent buffer that both hold whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, RANKS * SIZE, bias=False)
        self.register_buffer("scale", torch.linspace(1, 2, SIZE))
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(0, 1, RANKS * SIZE * SIZE).view(RANKS * SIZE, SIZE))

    def held(self) -> Tensor:
        weight: Tensor = self.linear.weight
        return weight._local_tensor if isinstance(weight, DTensor) else weight[:SIZE]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


def _saved(value: Any) -> None:
    torch.save(value, io.BytesIO())


MODEL_WAYS: dict[str, Callable[[Any, Wide], Any]] = {
    "forward": lambda wrapped, model: wrapped(X),
    "forward of the module": lambda wrapped, model: model(X),
    "training step": lambda wrapped, model: wrapped(X).sum().backward(),
    "sum": lambda wrapped, model: _value(model.linear.weight.sum()),
    "plus one": lambda wrapped, model: _value(model.linear.weight.detach() + 1),
    "matmul": lambda wrapped, model: _value(model.linear.weight.detach() @ model.linear.weight.detach().t()),
    "a buffer": lambda wrapped, model: model.scale.tolist(),
    "a buffer in an op": lambda wrapped, model: X * model.scale,
    "save a state dict": lambda wrapped, model: _saved(model.state_dict()),
    "save the weight": lambda wrapped, model: _saved(model.linear.weight),
    "whole state dict": lambda wrapped, model: _value(
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["linear.weight"]
    ),
}
WHOLE_WAYS: dict[str, Callable[[Any, Wide], Any]] = {
    "forward of the layer": lambda wrapped, model: model.linear(X),
    "forward without hooks": lambda wrapped, model: model.linear.forward(X),
}
SHARDED_WAYS: dict[str, Callable[[Any, Wide], Any]] = {
    "forward of the layer alone": lambda wrapped, model: model.linear(model.linear.weight.detach()),
    "forward past the hooks": lambda wrapped, model: Wide.forward(model, X),
    "full_tensor": lambda wrapped, model: model.linear.weight.full_tensor(),
    "redistribute": lambda wrapped, model: _value(model.linear.weight.redistribute(placements=[Replicate()])),
    "to_local": lambda wrapped, model: model.linear.weight.to_local().tolist(),
}


def _value(tensor: Tensor) -> Any:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.tolist()


def _read(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _value(value.detach())
    if isinstance(value, dict):
        return _read(list(value.values()))
    return list(map(_read, value)) if isinstance(value, (list, tuple)) else value


def _columns(model: Wide, mesh: DeviceMesh) -> Wide:
    parallelize_module(model, mesh["tensor_parallel"], {"linear": ColwiseParallel()})
    return model


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: "fsdp2",
    "tensor parallel": lambda: ModelParallelStrategy(_columns, data_parallel_size=1, tensor_parallel_size=RANKS),
}


def waiting(fabric: Fabric) -> tuple[Any, Wide]:
    with fabric.init_module(empty_init=True):
        model = Wide()
    return fabric.setup(model), model


def in_ranks(strategy: str) -> dict[str, str]:
    fabric, found = launch(STRATEGIES[strategy]()), {}
    with poisoned_memory():
        wrapped, model = waiting(fabric)
        for name, way in LOCAL_WAYS.items():
            if name in STAYS_RECORDED:
                found[name] = outcome_again(lambda case, way=way: _read(way(case)), Case(waiting(fabric)[1]))
            else:
                found[name] = outcome_again(lambda case, way=way: _read(way(case)), Case(model))
        ways = MODEL_WAYS | (WHOLE_WAYS if strategy == "ddp" else SHARDED_WAYS)
        for name, use in ways.items():
            found[name] = outcome_again(lambda case, use=use: use(wrapped, case.model), Case(model))
        fabric.init_missing(wrapped)
        expected = Wide()
        whole = _value(model.linear.weight.detach())
        found["values afterwards"] = str(whole == expected.linear.weight.tolist())
        found["buffer afterwards"] = str(torch.equal(model.scale, expected.scale))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_gets_no_value_out_of_a_model_that_waits(strategy: str) -> None:
    for found in run_ranks(RANKS, in_ranks, strategy=strategy, seconds=120):
        assert {found.pop("values afterwards"), found.pop("buffer afterwards")} == {"True"}
        assert len(found) > 130
        assert found == dict.fromkeys(found, REFUSED)
