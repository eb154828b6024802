"""One model in each setup that an idiom is tried in, and what plain PyTorch makes of the same files.

An idiom is the code with which another library gives a model its values, written as that library writes it. It gets
what ``fabric.setup`` returned for a model that waits. Every rank trains on the same batches: the mean of equal
gradients is that gradient to the bit, so trained weights can be compared with those of one device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_init import Fabric
from fabric_init.strategies import ModelParallelStrategy
from tests.support.launched import train
from tests.support.zoo import (
    MODELS,
    assert_close,
    assert_same,
    build,
    launch,
    one_device,
    set_up,
    weights,
    write_checkpoint,
)

ONE_AFTER_THE_OTHER = ["ddp", "fsdp2", "tensor parallel"]
"""Setups on two ranks that take the model first and the optimizer later."""
ON_RANKS = [*ONE_AFTER_THE_OTHER, "deepspeed_stage_3"]
SUMS_IN_ANOTHER_ORDER = "tensor parallel"
"""A product whose sum is split over the ranks is not that of one device to the last bit."""

INITIALIZED_IN_SETUP = "deepspeed_stage_3"
"""DeepSpeed copies the weights when it takes the optimizer, so the model gets its own init there, and nothing waits."""


class Files(NamedTuple):
    """The same weights in the formats that the idioms read; ``part`` lacks what ``LEFT_OUT`` names."""

    model: str
    raw: Path
    part: Path
    state: Path
    dcp: Path
    nested_dcp: Path
    hugging_face: Path


class Idiom(NamedTuple):
    """How a library loads.

    Attributes:
        load: called with the Fabric, the model and the files.
        keeps_parameters: whether it writes into them, so that the optimizer may have been made before.
        is_partial: whether it leaves tensors to the model's own init.
        writes: whether it writes outside of ``load_state_dict``, which a report cannot tell from writes of the user.
    """

    load: Callable[[Any, Any, Files], object]
    keeps_parameters: bool = True
    is_partial: bool = False
    writes: bool = False


class Found(NamedTuple):
    """What came of it on one rank."""

    loaded: dict[str, Tensor]
    losses: list[Tensor]
    trained: dict[str, Tensor]
    statuses: set[str]


def write_files(folder: Path, model: str) -> Files:
    """Write the weights of ``model`` in all formats."""
    raw = write_checkpoint(folder / "raw.pt", model)
    part = write_checkpoint(folder / "part.pt", model, partial=True)
    others = (folder / name for name in ("state.pt", "dcp", "nested_dcp", "hugging_face"))
    files = Files(model, raw, part, *others)
    state = torch.load(raw)
    torch.save({"model": state}, files.state)
    with warnings.catch_warnings(action="ignore"):  # "assuming the intent is to save in a single process"
        dcp.save(state, checkpoint_id=files.dcp)
        dcp.save({"model": state}, checkpoint_id=files.nested_dcp)
    files.hugging_face.mkdir()
    save_file({name: value.clone() for name, value in state.items()}, files.hugging_face / "model.safetensors")
    return files


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with a state, so that one that holds other parameters than the model would show."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def tensor_parallel(model: Any, mesh: DeviceMesh) -> nn.Module:
    """Split the two products of each block over the ranks."""
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def launched(setup: str) -> Fabric:
    """Return this rank's Fabric, launched."""
    if setup == "one device":
        return Fabric(accelerator="cpu", devices=1)
    if setup == "tensor parallel":
        return launch(ModelParallelStrategy(tensor_parallel, data_parallel_size=1, tensor_parallel_size=2))
    return launch(setup)


def waiting(fabric: Fabric, name: str, *, seed: int = 1, with_optimizer: bool = False) -> tuple[Any, Any]:
    """Return a model that waits for values after ``fabric.setup``, and an optimizer, if there is to be one by then."""
    model = build(fabric, name, seed=seed, empty_init=True)
    if with_optimizer:
        return set_up(fabric, model, make_optimizer)
    return fabric.setup_module(model), None


def tried(setup: str, idioms: Mapping[str, Idiom], files: Files) -> dict[str, Found]:
    """Load one model after each of ``idioms`` in this process, and train it."""
    found = {}
    for seed, (name, idiom) in enumerate(idioms.items()):
        try:
            fabric = launched(setup)  # with DeepSpeed, one of Lightning's runs one model
            model, optimizer = waiting(fabric, files.model, seed=seed, with_optimizer=idiom.keeps_parameters)
            idiom.load(fabric, model, files)
            statuses = {row.status for row in fabric.init_report(model).rows if row.kind == "parameter"}
            loaded = weights(model)
            if optimizer is None:
                optimizer = fabric.setup_optimizers(make_optimizer(model))
            found[name] = Found(loaded, train(model, optimizer, fabric), weights(model), statuses)
        except Exception as error:
            error.add_note(f"in the idiom {name!r}")
            raise
    return found


def expected(files: Files, *, is_partial: bool = False, seed: int = 1) -> Found:
    """Return what one device makes of the files: in plain PyTorch, unless the model's own init has to help."""
    if is_partial:
        model = one_device(files.model, seed=seed, checkpoint=files.part, strict=False)
    else:
        model = MODELS[files.model]()
        model.load_state_dict(torch.load(files.raw))
    loaded = weights(model)
    return Found(loaded, train(model, make_optimizer(model)), weights(model), set())


def check(setup: str, idioms: Mapping[str, Idiom], files: Files, ranks: Iterable[dict[str, Found]]) -> None:
    """Assert that on every rank each of ``idioms`` has led to the weights and losses of one device."""
    loaded = expected(files)
    for rank, found in enumerate(ranks):
        assert found.keys() == idioms.keys()
        for seed, (name, idiom) in enumerate(idioms.items()):
            wanted = expected(files, is_partial=True, seed=seed) if idiom.is_partial else loaded
            try:
                _compare(found[name], wanted, exactly=setup != SUMS_IN_ANOTHER_ORDER)
                if setup != INITIALIZED_IN_SETUP:
                    _check_statuses(found[name].statuses, idiom)
            except AssertionError as error:
                error.add_note(f"in the idiom {name!r}, on rank {rank}")
                raise


def _check_statuses(statuses: set[str], idiom: Idiom) -> None:
    initialized = {"initialized"} if idiom.is_partial else set()
    assert initialized <= statuses
    brought = statuses - initialized
    assert brought == {"loaded"} or (idiom.writes and brought <= {"loaded", "written by the user"}), brought


def _compare(found: Found, wanted: Found, *, exactly: bool) -> None:
    assert_same(found.loaded, wanted.loaded)
    if exactly:
        assert found.losses == wanted.losses
        assert_same(found.trained, wanted.trained)
    else:
        torch.testing.assert_close(found.losses, wanted.losses)
        assert_close(found.trained, wanted.trained, rtol=1e-4, atol=1e-5)
