"""The ways to get the first layers of a larger checkpoint into a model. Each prepares, and returns what is timed.

The file, too, is made here: 128 layers of four square bf16 weights each, under ``model.layers.N.``, by safetensors and
by ``torch.save``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from _shards import touch
from _workload import default_dtype, warm, warm_in_small_pages
from torch import nn

LAYERS, WIDTH = 128, 768
PREFIX = "model."
Build = Callable[[], nn.Module]


class Stack(nn.Module):
    """So many layers of the checkpoint's model."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in "qkvo"}) for _ in range(layers)
        )


def write(root: Path, layers: int, width: int) -> None:
    """Both files, unless they are there."""
    from safetensors.torch import save_file

    if (root / "model.pt").exists():
        return
    torch.manual_seed(0)
    names = [f"{PREFIX}layers.{layer}.{name}.weight" for layer in range(layers) for name in "qkvo"]
    weights = {name: torch.randn(width, width).bfloat16() for name in names}
    save_file(weights, root / "model.safetensors")
    torch.save(weights, root / "model.pt")


def phases(
    name: str, root: str, layers: str, width: str, pages: str
) -> Generator[tuple[str, Callable[[], Any]], Any, None]:
    file = Path(root) / ("model.pt" if name in OF_TORCH_FILE else "model.safetensors")
    build = CONTENDERS[name](file, int(layers), int(width))
    (warm_in_small_pages if pages == "small pages" else warm)(file)
    model = yield "ready", build
    if model is None:
        return
    yield "touch", lambda: touch(model)
    yield "verify", lambda: _verify(model, Path(root) / "model.safetensors")


def _verify(model: nn.Module, file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    on_meta = [name for name, value in model.named_parameters() if value.is_meta]
    with safe_open(file, "pt") as reference:
        wrong = [
            name
            for name, value in model.named_parameters()
            if not value.is_meta and not torch.equal(value, reference.get_tensor(PREFIX + name))
        ]
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"device": None, "shard": size, "on_meta": on_meta, "wrong": wrong}


def ours(file: Path, layers: int, width: int, *, mmap: bool = True) -> Build:
    from fabric_init import deferred_init, materialize
    from fabric_init.checkpoints import Layers, Part

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), deferred_init():
            model = Stack(layers, width)
        materialize(model, checkpoint=file, rename=[Part(PREFIX), Layers(range(layers))], mmap=mmap)
        return model

    return build


def ours_copied(file: Path, layers: int, width: int) -> Build:
    return ours(file, layers, width, mmap=False)


def load_file(file: Path, layers: int, width: int) -> Build:
    from safetensors.torch import load_file

    return _whole_then_pick(lambda: load_file(file), layers, width)


def torch_load(file: Path, layers: int, width: int) -> Build:
    return _whole_then_pick(lambda: torch.load(file, weights_only=True), layers, width)


def _whole_then_pick(load: Callable[[], dict[str, torch.Tensor]], layers: int, width: int) -> Build:
    def build() -> nn.Module:
        with default_dtype(torch.bfloat16):
            model = Stack(layers, width)
        state = load()
        model.load_state_dict({name: state[PREFIX + name] for name in model.state_dict()})
        return model

    return build


def hand_written(file: Path, layers: int, width: int) -> Build:
    from safetensors import safe_open

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), torch.device("meta"):
            model = Stack(layers, width)
        with safe_open(file, "pt") as reader:
            state = {name: reader.get_tensor(PREFIX + name) for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        return model

    return build


CONTENDERS: dict[str, Callable[[Path, int, int], Build]] = {
    "torch_load": torch_load,
    "load_file": load_file,
    "hand_written": hand_written,
    "ours": ours,
    "ours_copied": ours_copied,
    "ours_torch": ours,
}
OF_TORCH_FILE = ("torch_load", "ours_torch")
