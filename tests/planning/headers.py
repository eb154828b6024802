"""Checkpoints of which there is only a header, and models to plan for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fabric_init import deferred_init
from fabric_init.checkpoints import BaseReader, Region, TensorSpec
from fabric_init.planning.make_plan import make_plan
from fabric_init.planning.matching import Matching, match
from fabric_init.planning.plan import LoadOptions, Plan
from fabric_init.planning.tensors import tensors_and_tapes


class Header(BaseReader):
    """Whoever reads a weight of it fails."""

    format = "header"

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.path = Path("folder/model.safetensors")
        known = dtypes or {}
        self.specs = {
            key: TensorSpec(torch.Size(shape), known.get(key, torch.float32)) for key, shape in shapes.items()
        }

    def read(self, key: str, region: Region | None = None) -> NoReturn:
        raise AssertionError(f"{key} was read while planning")


def tree(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A recorded model with parameters of these names."""
    with deferred_init():
        model = nn.Module()
        for name, shape in shapes.items():
            place = model
            *modules, leaf = name.split(".")
            for module in modules:
                if not hasattr(place, module):
                    place.add_module(module, nn.Module())
                place = getattr(place, module)
            place.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return model


def plan_of(model: nn.Module, reader: BaseReader, **wanted: Any) -> Plan:
    slots, _, tapes = tensors_and_tapes(model)
    return make_plan(slots, tapes, reader, LoadOptions(**wanted))


def matching_of(model: nn.Module, reader: BaseReader, **wanted: Any) -> Matching:
    slots, _, tapes = tensors_and_tapes(model)
    return match(slots, tapes, reader, LoadOptions(**wanted))
