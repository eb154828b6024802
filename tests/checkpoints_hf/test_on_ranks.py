"""Folders that transformers has saved, on two ranks under FSDP2: the right weights, and each reads its own part."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init import FabricInitError
from fabric_init.checkpoints import open_checkpoint
from tests.checkpoints_hf.sample import SAMPLE
from tests.support.architectures import model_classes
from tests.support.hugging_face_folders import perturb
from tests.support.ranks import run_ranks, run_ranks_each
from tests.support.watched import watched
from tests.support.worker import buildable
from tests.support.zoo import assert_same, launch, weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

ON_RANKS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": {},
    "MixtralForCausalLM": {},
    "GPT2LMHeadModel": {},
    "T5ForConditionalGeneration": {},
    "Wav2Vec2Model": {},
    "BertForMaskedLM": {},
    "DeepseekV3ForCausalLM": {},
}
"""Classes of the sample, and what their tiny configs shall say beside."""
TOLERANCE = 1.05


class Loaded(TypedDict):
    """What came of it on one rank.

    Attributes:
        weights: whole, or the error with which the folder was refused.
        read: bytes of the folder's tensors.
        held: bytes of the rank's shards, and of what it holds whole.
    """

    weights: dict[str, Tensor] | str
    read: int
    held: int


def class_named(name: str) -> Any:
    found = {model_class.__name__: model_class for model_class in model_classes(SAMPLE[name])}
    return found[name]


def save_all(folder: Path) -> None:
    """Save each model, and what ``from_pretrained`` makes of it."""
    warnings.simplefilter("ignore")
    for name, options in ON_RANKS.items():
        model_class = class_named(name)
        make, why = buildable(model_class)
        assert make is not None, why
        config = make()
        for option, value in options.items():
            setattr(config, option, value)
        torch.manual_seed(0)
        model = model_class(config)
        perturb(model)
        model.save_pretrained(folder / name)
        torch.save(weights(model_class.from_pretrained(folder / name)), folder / f"{name}.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    run_ranks(1, save_all, folder=folder, seconds=300)
    return folder


def held_by(model: nn.Module) -> int:
    """Bytes of what this rank has of each tensor that is saved."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def load(name: str, folders: Path) -> Loaded:
    warnings.simplefilter("ignore")
    model_class, folder = class_named(name), folders / name
    config = model_class.config_class.from_pretrained(folder)
    opened = watched()
    fabric = launch("fsdp2")
    try:
        with fabric.init_module(checkpoint=folder):
            model = model_class(config)
        read_before = [len(reader.parts) for reader in opened]  # a sample, to see that all ranks have the same file
        model = fabric.setup(model)
    except FabricInitError as error:
        return Loaded(weights=str(error), read=0, held=0)
    read = 0
    for reader, before in zip(opened, read_before, strict=True):
        for key, region in reader.parts[before:]:
            spec = reader.spec(key)
            read += (spec.shape.numel() if region is None else region.numel) * spec.dtype.itemsize
    held = held_by(model)
    return Loaded(weights=weights(model), read=read, held=held)


@pytest.fixture(scope="module")
def on_ranks(folders: Path) -> dict[str, list[Loaded]]:
    return run_ranks_each(2, load, {name: {"name": name} for name in ON_RANKS}, folders=folders)


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_hold_what_from_pretrained_gives_and_read_their_parts_only(
    name: str, folders: Path, on_ranks: dict[str, list[Loaded]]
) -> None:
    expected = torch.load(folders / f"{name}.pt")
    for rank in on_ranks[name]:
        assert_same(rank["weights"], expected)
        assert rank["read"] <= TOLERANCE * rank["held"]


def test_the_ranks_together_hold_no_more_than_the_folder_and_what_each_has_whole(
    folders: Path, on_ranks: dict[str, list[Loaded]]
) -> None:
    """Guards against a part that counts as a rank's own because all is."""
    reader = open_checkpoint(folders / "LlamaForCausalLM")
    size = sum(reader.spec(key).shape.numel() * reader.spec(key).dtype.itemsize for key in reader.keys())
    first, second = on_ranks["LlamaForCausalLM"]
    assert first["held"] + second["held"] <= TOLERANCE * size
    assert first["read"] + second["read"] <= TOLERANCE * size
