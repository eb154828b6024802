"""litgpt's pretraining changes a model that waits between its block and ``setup``: its init, its ties, its buffers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fabric_init.strategies import FSDPStrategy
from tests.idioms.setups import launched
from tests.support.ranks import run_ranks
from tests.support.zoo import MODELS, assert_same, launch, ties, weights

TIED = {frozenset({"embed_tokens.weight", "lm_head.weight"})}


def init_weights(module: nn.Linear | nn.Embedding, value: float) -> None:
    nn.init.constant_(module.weight, value)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def pretrained(setup: str) -> tuple[dict[str, Tensor], set[frozenset[str]]]:
    """Return what ``litgpt.pretrain.main`` gets from ``setup``, and what is tied there."""
    fabric = launch("fsdp") if setup == "fsdp" else launched(setup)
    with fabric.init_module(empty_init=True):
        model = MODELS["even, untied"]()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.Linear)):
            module.reset_parameters = partial(init_weights, module, 0.125)  # type: ignore[assignment]
    for layer in model.layers:
        layer.down.reset_parameters = partial(init_weights, layer.down, 0.25)
    if not isinstance(fabric.strategy, FSDPStrategy):  # which calls them itself
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    model.embed_tokens.weight = model.lm_head.weight
    model.inv_freq = torch.linspace(1, 2, 4, device=model.inv_freq.device)
    model = fabric.setup(torch.compile(model, backend="eager"))
    return weights(model), ties(model)


@pytest.mark.parametrize("setup", ["ddp", "fsdp", "fsdp2"])
def test_what_changes_before_setup_counts_on_two_ranks_as_on_one_device(setup: str) -> None:
    expected, tied = pretrained("one device")
    assert tied == TIED
    assert expected["embed_tokens.weight"].eq(0.125).all()
    assert expected["layers.1.down.weight"].eq(0.25).all()
    assert torch.equal(expected["inv_freq"], torch.linspace(1, 2, 4))
    for found, found_ties in run_ranks(2, pretrained, setup=setup):
        assert_same(found, expected)
        assert found_ties == TIED
