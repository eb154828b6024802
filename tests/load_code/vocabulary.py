"""Load code of a few lines each, for any layer that has a ``weight``; and what makes the file that it understands.

``age`` turns the keys of a layer, as it is now, into those of an older version. The load code turns them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.load_code.cases import State

Override = Callable[[Any, State, str], bool]
"""Changes the state dict before ``_load_from_state_dict`` of torch gets it; true if that need not be called."""
Versions = dict[str, dict[str, int]]


class Code(NamedTuple):
    """One kind of load code.

    Attributes:
        age: makes the older keys out of today's; it gets the state dict, the layer's prefix, and the layer.
        install: registers hooks on a layer.
        override: stands in the layer's ``_load_from_state_dict``.
        forgets_version: whether the file has no version of the layer.
    """

    age: Callable[[State, str, Any], None] = lambda state, prefix, layer: None
    install: Callable[[Any], None] = lambda layer: None
    override: Override | None = None
    forgets_version: bool = False


def public(hook: Callable[[Any, State, str], None]) -> Callable[[Any], None]:
    """Return what registers ``hook`` by torch's public function."""

    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        hook(module, state, prefix)

    return lambda layer: layer.register_load_state_dict_pre_hook(before)


def private(hook: Callable[[Any, State, str], None]) -> Callable[[Any], None]:
    """Return what registers ``hook`` by torch's private function, which does not say for which module."""

    def install(layer: Any) -> None:
        def before(state: State, prefix: str, *_: Any) -> None:
            hook(layer, state, prefix)

        layer._register_load_state_dict_pre_hook(before)

    return install


def overridden(hook: Callable[[Any, State, str], None]) -> Override:
    """Return an override that does what ``hook`` does."""

    def override(layer: Any, state: State, prefix: str) -> bool:
        hook(layer, state, prefix)
        return False

    return override


def afterwards(hook: Callable[[Any, Any], None]) -> Callable[[Any], None]:
    """Return what registers a post hook."""
    return lambda layer: layer.register_load_state_dict_post_hook(hook)


def rename(layer: Any, state: State, prefix: str) -> None:
    if prefix + "kernel" in state:
        state[prefix + "weight"] = state.pop(prefix + "kernel")


def old_name(state: State, prefix: str, layer: Any) -> None:
    state[prefix + "kernel"] = state.pop(prefix + "weight")


def flip(layer: Any, state: State, prefix: str) -> None:
    if prefix + "weight" in state:
        state[prefix + "weight"] = state[prefix + "weight"].flip(0)


def fuse(layer: Any, state: State, prefix: str) -> None:
    halves = [state.pop(f"{prefix}weight.{index}", None) for index in range(2)]
    if all(half is not None for half in halves):
        state[prefix + "weight"] = torch.cat(halves)


def halves(state: State, prefix: str, layer: Any) -> None:
    weight = state.pop(prefix + "weight")
    state[f"{prefix}weight.0"], state[f"{prefix}weight.1"] = weight[:1].clone(), weight[1:].clone()


def floats(layer: Any) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in layer._parameters.items() if value is not None]


def unpack(layer: Any, state: State, prefix: str) -> None:
    packed = state.pop(prefix + "packed", None)
    if packed is not None:
        parts = packed.split([value.numel() for _, value in floats(layer)])
        for (name, value), part in zip(floats(layer), parts, strict=True):
            state[prefix + name] = part.view(value.shape)


def pack(state: State, prefix: str, layer: Any) -> None:
    state[prefix + "packed"] = torch.cat([state.pop(prefix + name).flatten() for name, _ in floats(layer)])


def drop(layer: Any, state: State, prefix: str) -> None:
    state.pop(prefix + "stray", None)


def add_stray(state: State, prefix: str, layer: Any) -> None:
    state[prefix + "stray"] = torch.ones(3)


def keep_own(layer: Any, state: State, prefix: str) -> None:
    state.setdefault(prefix + "weight", layer.weight)


def no_weight(state: State, prefix: str, layer: Any) -> None:
    del state[prefix + "weight"]


def divide_large(layer: Any, state: State, prefix: str) -> None:
    weight = state.get(prefix + "weight")
    if weight is not None and weight.abs().max() > 3:
        state[prefix + "weight"] = weight / 16


def large(state: State, prefix: str, layer: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"] * 16


def quantize(state: State, prefix: str, layer: Any) -> None:
    state[prefix + "weight_scale"] = torch.tensor(0.125)
    state[prefix + "weight"] = (state[prefix + "weight"] * 8).round().to(torch.int8)


def dequantize(layer: Any, state: State, prefix: str) -> None:
    scale = state.pop(prefix + "weight_scale", None)
    if scale is not None and prefix + "weight" in state:
        state[prefix + "weight"] = state[prefix + "weight"].float() * scale.item()


def double(layer: Any, state: State, prefix: str) -> None:
    if prefix + "weight" in state:
        state[prefix + "weight"] = state[prefix + "weight"] * 2


def double_without_version(layer: Any) -> None:
    def before(module: Any, state: State, prefix: str, metadata: Any, *_: Any) -> None:
        if metadata.get("version") is None:
            double(module, state, prefix)

    layer.register_load_state_dict_pre_hook(before)


def refresh(layer: Any, incompatible: Any) -> None:
    with torch.no_grad():
        layer.total.copy_(layer.weight.sum())


def count(layer: Any, incompatible: Any) -> None:
    layer.loads += 1
    layer.level = layer.weight.abs().max().item()


def forgive(layer: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith("weight")]


def normalize(layer: Any, incompatible: Any) -> None:
    with torch.no_grad():
        layer.weight.div_(layer.weight.norm())


def copy_alone(layer: Any, state: State, prefix: str) -> bool:
    with torch.no_grad():
        for name, value in floats(layer):
            if prefix + name in state:
                value.copy_(state[prefix + name].view(value.shape) * 3)
    return True


def assign(layer: Any, state: State, prefix: str) -> bool:
    for name, value in floats(layer):
        if prefix + name in state:
            setattr(layer, name, nn.Parameter(state[prefix + name].view(value.shape) + 1))
    return True


CODES: dict[str, Code] = {
    "none": Code(),
    "a public hook renames": Code(old_name, public(rename)),
    "a private hook renames": Code(old_name, private(rename)),
    "an override renames": Code(old_name, override=overridden(rename)),
    "a public hook permutes": Code(lambda state, prefix, layer: flip(layer, state, prefix), public(flip)),
    "an override fuses": Code(halves, override=overridden(fuse)),
    "a private hook splits": Code(pack, private(unpack)),
    "a public hook drops": Code(add_stray, public(drop)),
    "a hook keeps the own init": Code(no_weight, public(keep_own)),
    "a hook looks at values": Code(large, private(divide_large)),
    "a hook casts": Code(quantize, public(dequantize)),
    "a hook reads the version": Code(install=double_without_version, forgets_version=True),
    "a post hook derives a buffer": Code(install=afterwards(refresh)),
    "a post hook counts": Code(install=afterwards(count)),
    "a post hook forgives": Code(no_weight, afterwards(forgive)),
    "a post hook changes a parameter": Code(install=afterwards(normalize)),
    "an override copies by itself": Code(override=copy_alone),
    "an override assigns": Code(override=assign),
}


# -- of what has children ----------------------------------------------------------------------------------------------


def of_children(state: State, prefix: str, old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(prefix + old)]:
        state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)


def rename_children(group: Any, state: State, prefix: str) -> None:
    of_children(state, prefix, "layer", "parts.")


def old_children(state: State, prefix: str, group: Any) -> None:
    of_children(state, prefix, "parts.", "layer")


def drop_child(group: Any, state: State, prefix: str) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}old_head.")]:
        del state[key]


def add_child(state: State, prefix: str, group: Any) -> None:
    state[f"{prefix}old_head.weight"] = torch.ones(2, 2)


def scale_children(group: Any, incompatible: Any) -> None:
    with torch.no_grad():
        for parameter in group.parts.parameters():
            parameter.mul_(0.5)


GROUP_CODES: dict[str, Code] = {
    "none": Code(),
    "a public hook renames children": Code(old_children, public(rename_children)),
    "a private hook drops a child": Code(add_child, private(drop_child)),
    "an override renames children": Code(old_children, override=overridden(rename_children)),
    "a post hook scales children": Code(install=afterwards(scale_children)),
}
