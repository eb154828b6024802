"""Tensors that share memory in the model share it after a load, and expanded ones are loaded as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fabric_init import Fabric


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


class Pair(nn.Module):
    def __init__(self, share: Callable[[nn.Linear, nn.Linear], None]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        share(self.first, self.second)


def through_data(first: nn.Linear, second: nn.Linear) -> None:
    second.weight.data = first.weight.data


def transposed(first: nn.Linear, second: nn.Linear) -> None:
    second.weight = nn.Parameter(first.weight.t())


def views_of_one(first: nn.Linear, second: nn.Linear) -> None:
    flat = torch.randn(24)
    first.weight, second.weight = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[8:].view(4, 4))


@pytest.mark.parametrize("share", [through_data, transposed, views_of_one])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_load_keeps_what_shares_memory_shared(share, kind: str, fabric: Fabric, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plain = Pair(share)
    path = tmp_path / f"pair.{kind}"
    if kind == "pt":
        torch.save(plain.state_dict(), path)
    else:
        save_file({name: value.clone().contiguous() for name, value in plain.state_dict().items()}, path)
    with fabric.init_module(checkpoint=path):
        model = Pair(share)
    assert torch.equal(model.second.weight, plain.second.weight)
    with torch.no_grad():
        for net in (model, plain):
            net.first.weight.zero_()
    assert torch.equal(model.second.weight, plain.second.weight)


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.register_buffer("mask", torch.arange(4.0).expand(3, -1))


def test_an_expanded_buffer_is_loaded_into_memory_of_its_own(fabric: Fabric, tmp_path: Path) -> None:
    values = {**Expanded().state_dict(), "mask": torch.arange(12.0).view(3, 4)}
    torch.save(values, tmp_path / "expanded.pt")
    with fabric.init_module(checkpoint=tmp_path / "expanded.pt"):
        model = Expanded()
    assert torch.equal(model.mask, values["mask"])


def test_load_state_dict_refuses_an_expanded_buffer_by_name_as_plain_pytorch_does(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Expanded()
    with pytest.raises(RuntimeError, match='While copying the parameter named "mask"'):
        model.load_state_dict(Expanded().state_dict())


def test_the_own_init_of_an_expanded_buffer_is_that_of_plain_pytorch(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Expanded()
    fabric.init_missing(model)
    assert torch.equal(model.mask, Expanded().mask)
