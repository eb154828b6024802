"""torchtitan's way to train: tensor parallel, activation checkpointing, torch.compile per block, FSDP2.

The model and its parallelization are those of ``examples/torchtitan_style.py``. What every rank gathers is bit-equal to
one device, whatever the mesh and wherever ``init_weights`` is called.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.planning.tensors import plain_name
from fabric_init.sharding.dtensor import region_of
from tests.support.ranks import run_ranks
from tests.support.watched import bytes_read

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchtitan_style.py"
TO_HUGGING_FACE = {
    r"^tok_embeddings": "model.embed_tokens",
    r"^(layers|norm)": r"model.\1",
    r"attention\.w([qkvo])\.": r"self_attn.\1_proj.",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"ffn_norm": "post_attention_layernorm",
    r"attention_norm": "input_layernorm",
    r"^output": "lm_head",
}


@functools.cache
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchtitan_style", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks for it
    spec.loader.exec_module(module)
    return module


def eager(seed: int = 3) -> nn.Module:
    """Return the model as plain PyTorch builds and initializes it on one device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = example().Llama()
        model.init_weights()
    return model


def in_hugging_faces_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in TO_HUGGING_FACE.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    state = in_hugging_faces_names(eager(seed=1).state_dict())
    save_file(state, folder / "whole.safetensors")
    save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, folder / "body.safetensors")
    return folder


def parallel(tensor: int, initialize: str) -> nn.Module:
    """Return the recorded model, parallelized; ``initialize`` is where its own init is called."""
    module, world = example(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(3)
    with deferred_init(rng="eager"):
        model = module.Llama()
        if initialize == "before":
            model.init_weights()
        if initialize != "later":
            module.parallelize(model, mesh, backend="eager")
        if initialize == "in the block":
            model.init_weights()
    if initialize == "later":
        module.parallelize(model, mesh, backend="eager")
        with deferred_init(rng="eager"):
            model.init_weights()
    return model


def gathered(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {plain_name(name): (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def materialized(model: nn.Module, checkpoint: Path, **options: Any) -> None:
    """Fill ``model`` from ``checkpoint``, and fail if more than 1.05 of what this rank keeps is read for it."""
    with bytes_read() as so_far:
        materialize(model, checkpoint=checkpoint, rename=example().HUGGING_FACE, **options)
    kept = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    compared = 32 * 4 * len(list(model.parameters()))  # the values by which ranks agree on the file
    assert 0.5 * kept <= so_far() <= 1.05 * kept + compared


def emptied(tensor: int) -> nn.Module:
    """Return the model as torchtitan starts it from a checkpoint: on meta, parallelized, emptied, and loaded."""
    module, world = example(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        model: nn.Module = module.Llama()
    module.parallelize(model, mesh, backend="eager")
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()  # type: ignore[operator]
    set_model_state_dict(model, eager(seed=1).state_dict(), options=StateDictOptions(full_state_dict=True))
    return model


def train(model: nn.Module) -> None:
    optimizer, tokens = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.arange(16).repeat(2, 1)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


# -- real ranks --------------------------------------------------------------------------------------------------------


def start_and_resume(tensor: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    rename = example().HUGGING_FACE
    own, theirs = gathered(eager()), gathered(eager(seed=1))

    model = parallel(tensor, "in the block")
    materialize(model)
    assert_same(gathered(model), own)

    model = parallel(tensor, "before")
    with pytest.raises(CheckpointMismatchError, match=r"output\.weight"):
        materialize(model, checkpoint=folder / "body.safetensors", rename=rename)
    materialized(model, folder / "body.safetensors", strict=False)
    assert_same(gathered(model), {**theirs, "output.weight": own["output.weight"]})

    model, its = parallel(tensor, "in the block"), emptied(tensor)
    materialized(model, folder / "whole.safetensors")
    assert_same(gathered(model), theirs)
    train(model)
    train(its)
    assert_same(gathered(model), gathered(its))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / f"step-{tensor}")
    resumed = parallel(tensor, "in the block")
    materialize(resumed, checkpoint=folder / f"step-{tensor}", entry="model")
    assert_same(gathered(resumed), gathered(model))


def test_ranks_start_and_resume_with_the_weights_of_one_device_and_train_as_torchtitan(
    ranks: int, folder: Path
) -> None:
    run_ranks(ranks, start_and_resume, tensor=ranks // 2, folder=folder, seconds=150 * ranks)


# -- simulated ranks ---------------------------------------------------------------------------------------------------


def parts(tensor: int, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """Return the names of what is not this rank's part of one device's weights, in each of the ``cases``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    wrong = {}
    for name, (initialize, load) in cases.items():
        options = {**load, "rename": example().HUGGING_FACE} if load else {}
        model, whole = parallel(tensor, initialize), parallel_on_one_device(initialize, options)
        materialize(model, process_group=False, **options)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        wrong[name] = [key for key, each in tensors if not torch.equal(*both(each, whole[plain_name(key)]))]
    return wrong


def parallel_on_one_device(initialize: str, options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    with deferred_init(rng="eager"):
        model = example().Llama()
        if initialize != "later":
            model.init_weights()
    if initialize == "later":
        with deferred_init(rng="eager"):
            model.init_weights()
    materialize(model, process_group=False, **options)
    return gathered(model)


def both(found: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(found, DTensor):
        return found, whole
    box = region_of(found)
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        whole = whole.narrow(dim, start, size)
    return found.to_local().detach(), whole


@pytest.mark.parametrize(("world", "tensor"), [(1, 1), (4, 2)])
def test_each_rank_holds_its_part_of_the_weights_of_one_device(world: int, tensor: int, folder: Path) -> None:
    body = {"checkpoint": folder / "body.safetensors", "strict": False}
    cases = {
        "from scratch": ("in the block", {}),
        "from scratch, init in a block of its own": ("later", {}),
        "checkpoint": ("in the block", {"checkpoint": folder / "whole.safetensors"}),
        "missing head": ("in the block", body),
        "missing head, init in a block of its own": ("later", body),
    }
    for wrong in run_ranks(world, parts, tensor=tensor, cases=cases, seconds=300):
        assert {case: names for case, names in wrong.items() if names} == {}
