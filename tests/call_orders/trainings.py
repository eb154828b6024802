"""Every order in which a model is loaded and set up, and an optimizer and its schedule are made; then it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

STEPS = 3


def orders() -> Iterator[tuple[str, ...]]:
    """What is called, one after the other; without a load where the block has declared it.

    An optimizer comes before its schedule, and after a load that puts other parameters into the model.
    """
    for load in ("load", "assign", ""):
        for order in permutations(call for call in (load, "optimizer", "scheduler", "setup") if call):
            at = order.index("optimizer")
            if at < order.index("scheduler") and (load != "assign" or order.index("assign") < at):
                yield order
                if at < order.index("setup"):
                    yield tuple("setup without it" if call == "setup" else call for call in order)


def train(model: Any, order: tuple[str, ...], state: dict[str, Tensor], tokens: Tensor, fabric: Any = None) -> Any:
    """The model after these calls and some steps; without ``fabric`` what plain PyTorch makes of it."""
    optimizer: Any = None
    scheduler: Any = None
    together = False
    for call in order:
        if call in ("load", "assign"):
            model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=call == "assign")
            model.tie_weights()  # which assign undoes
        elif call == "optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        elif call == "scheduler":
            scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
        elif fabric is not None:
            together = call == "setup" and optimizer is not None
            model, optimizer = fabric.setup(model, optimizer) if together else (fabric.setup(model), optimizer)
    if fabric is not None and not together:
        optimizer = fabric.setup_optimizers(optimizer)
    for _ in range(STEPS):
        loss = model(tokens).logits.float().pow(2).mean()
        fabric.backward(loss, **({"model": model} if together else {})) if fabric is not None else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model
