"""Load code that runs once a module and its children have their values, and extra state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.load_code.cases import ROWS, WIDTH, State, case, inside, made
from tests.load_code.hooks import LINEAR


class Linear(nn.Linear):
    """A layer whose subclasses have load code."""

    derived: Tensor

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        nn.Module.register_load_state_dict_post_hook(self, type(self).after)

    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def saved() -> State:
        return made(LINEAR)


class Derived(Linear):
    """Keeps the norms of its rows in a buffer."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("derived", torch.zeros(WIDTH), persistent=self.persistent)

    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        with torch.no_grad():
            module.derived.copy_(module.weight.norm(dim=1))


@inside("a post hook refreshes a persistent buffer")
class DerivedPersistent(Derived):
    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"derived": (WIDTH,)})


@inside("a post hook refreshes a buffer that is not persistent")
class DerivedNonPersistent(Derived):
    persistent = False


@inside("a post hook puts a new buffer in the place of one that is not persistent")
class DerivedAnew(DerivedNonPersistent):
    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        module.derived = module.weight.detach().t() @ module.weight.detach()


@inside("a post hook computes plain attributes")
class PlainAttributes(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0
        self.negative = True
        self.loads = 0
        self.rows: Any = None

    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        module.largest = module.weight.abs().max().item()
        module.negative = bool((module.bias < 0).any())
        module.loads += 1
        module.rows = module.weight.detach().sum(1)


@inside("a post hook changes a parameter")
class ChangesParameter(Linear):
    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        with torch.no_grad():
            module.bias.add_(module.weight.mean())


@inside("a post hook forgives what is missing")
class ForgivesMissing(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.linspace(1, 2, WIDTH))

    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        for key in [key for key in incompatible.missing_keys if key.endswith("logit_scale")]:
            incompatible.missing_keys.remove(key)


@inside("a post hook forgives what is unexpected")
class ForgivesUnexpected(Linear):
    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        incompatible.unexpected_keys[:] = [key for key in incompatible.unexpected_keys if "rotary" not in key]

    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"rotary.inv_freq": (3,), "rotary_cache": (2, 3)})


@case("a post hook of the root clears what is missing, and fills it")
class ClearsAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.ema = nn.Linear(WIDTH, WIDTH)
        nn.Module.register_load_state_dict_post_hook(self, type(self).after)

    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        if all(key.startswith("ema.") for key in incompatible.missing_keys):
            incompatible.missing_keys.clear()
            with torch.no_grad():
                for mean, value in zip(module.ema.parameters(), module.body.parameters(), strict=True):
                    mean.copy_(value)

    @staticmethod
    def saved() -> State:
        return made({"body.weight": (WIDTH, WIDTH), "body.bias": (WIDTH,)})


class Stateful(nn.Linear):
    """Has extra state, and takes it apart."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.steps = 0
        self.history: list[float] = []
        self.register_buffer("table", torch.zeros(ROWS), persistent=False)

    def get_extra_state(self) -> Any:
        return {"steps": self.steps, "history": self.history}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"] + 1
        self.history = [2 * value for value in state["history"]]
        self.table.fill_(state["steps"])


@inside("extra state of plain data becomes attributes and a buffer")
class PlainExtraState(Stateful):
    @staticmethod
    def saved() -> State:
        return made(LINEAR) | {"_extra_state": {"steps": 4, "history": [0.5, 0.25]}}


@inside("extra state that is a tensor is copied, and scales a parameter that is there already")
class TensorExtraState(Stateful):
    def get_extra_state(self) -> Any:
        return self.table

    def set_extra_state(self, state: Any) -> None:
        self.table.copy_(state)
        with torch.no_grad():
            self.weight.mul_(state[0])

    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"_extra_state": (ROWS,)})
