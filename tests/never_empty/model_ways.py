"""Ways of running, saving, copying and compiling a model, and compiled code that runs with other tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.never_empty.targets import values
from tests.never_empty.ways import ROWS, Case, Way, X, in_thread, loaded_again


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return what compiled and traced code computes."""
    return F.linear(x, weight) * 2 + weight[0]


class Product(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) * 2 + weight[0]


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    compiled = torch.compile(product, backend="eager")
    compiled(X, values())
    return compiled


@cache
def _traced() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.jit.trace(product, (X, values()))


@cache
def _scripted() -> Callable[[Tensor, Tensor], Tensor]:
    scripted = torch.jit.script(product)
    scripted(X, values())
    return scripted


@cache
def _exported() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.export.export(Product(), (X, values())).module()


@cache
def _in_graph() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.fx.symbolic_trace(Product())


def _scripted_again(run: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(run, file)
    file.seek(0)
    return torch.jit.load(file)


def _compiled_before_with_values(case: Case) -> Any:
    other = type(case.model)()
    compiled = torch.compile(lambda model, x: model(x), backend="eager")
    compiled(other, X)
    return compiled(case.model, X)


def _averaged(case: Case) -> Tensor:
    if not list(case.model.parameters()):
        return case.model(X)
    averaged = torch.optim.swa_utils.AveragedModel(case.model)
    averaged.update_parameters(case.model)
    averaged.update_parameters(case.model)
    return averaged(X)


def _swapped_out_and_back(case: Case) -> Tensor:
    torch.func.functional_call(
        case.model, {name: torch.ones_like(p, device="cpu") for name, p in case.model.named_parameters()}, (X,)
    )
    return case.model(X)


def _saved(case: Case) -> Any:
    state = case.model.state_dict()
    return loaded_again(state) if state else case.t.tolist()


def _saved_as_safetensors(case: Case) -> Any:
    state = {name: tensor.contiguous() for name, tensor in case.model.state_dict().items()}
    safetensors.torch.load(safetensors.torch.save({key: state[key] for key in list(state)[:1]}))
    return case.t.tolist()


COMPILED: dict[str, Way] = {
    "compiled function that has run": lambda c: _compiled()(X, c.t),
    "traced function that has run": lambda c: _traced()(X, c.t),
    "scripted function that has run": lambda c: _scripted()(X, c.t),
    "exported program": lambda c: _exported()(X, c.t),
    "fx graph": lambda c: _in_graph()(X, c.t),
    "compiled function": lambda c: torch.compile(product, backend="eager")(X, c.t),
    "traced function": lambda c: torch.jit.trace(product, (X, c.t.detach()))(X, c.t),
    "make_fx": lambda c: torch.fx.experimental.proxy_tensor.make_fx(product)(X, c.t.detach())(X, c.t.detach()),
}

MODELS: dict[str, Way] = {
    "forward": lambda c: c.model(X),
    ".forward": lambda c: c.model.forward(X),
    "class's forward": lambda c: type(c.model).forward(c.model, X),
    "forward in eval": lambda c: c.model.eval()(X),
    "forward in a Sequential": lambda c: nn.Sequential(c.model, nn.ReLU())(X),
    "forward in inference_mode": lambda c: torch.inference_mode()(c.model)(X).clone(),
    "forward in a thread": lambda c: in_thread(lambda: c.model(X)),
    "checkpointed forward": lambda c: torch.utils.checkpoint.checkpoint(c.model, X, use_reentrant=False),
    "vmap of the model": lambda c: torch.func.vmap(c.model)(X),
    "jacrev of the model": lambda c: torch.func.jacrev(c.model)(X[0]),
    "functional_call with its state": lambda c: torch.func.functional_call(
        c.model, c.model.state_dict(), (X,), tie_weights=False
    ),
    "functional_call, then forward": _swapped_out_and_back,
    "deepcopy, then forward": lambda c: copy.deepcopy(c.model)(X),
    "AveragedModel": _averaged,
    "export": lambda c: torch.export.export(c.model, (X,)).module()(X),
    "export, not strict": lambda c: torch.export.export(c.model, (X,), strict=False).module()(X),
    "jit.trace": lambda c: torch.jit.trace(c.model, (X,))(X),
    "jit.trace, saved": lambda c: _scripted_again(torch.jit.trace(c.model, (X,)))(X),
    "fx trace": lambda c: torch.fx.symbolic_trace(c.model)(X),
    "compile": lambda c: torch.compile(c.model, backend="eager")(X),
    "compile of what ran with a filled model": _compiled_before_with_values,
    "backward": lambda c: torch.autograd.grad(c.model(x := X.clone().requires_grad_()).sum(), x),
    "torch.save of its state": _saved,
    "safetensors of its state": _saved_as_safetensors,
    "to double": lambda c: c.model.double().held().double().tolist(),
    "to the cpu, then forward": lambda c: c.model.to("cpu")(X),
    "rows of its state": lambda c: [t[ROWS].tolist() for t in c.model.state_dict().values()] + c.t.tolist(),
    "pickled state": lambda c: [pickle.loads(pickle.dumps(t)) for t in c.model.state_dict().values()] + c.t.tolist(),
    "vector of parameters": lambda c: (
        nn.utils.parameters_to_vector([*c.model.parameters(), torch.ones(1)]).tolist() + c.t.tolist()
    ),
    "stack_module_state": lambda c: torch.func.stack_module_state([c.model, type(c.model)()])[0] or c.t.tolist(),
}

DOES_NOT_APPLY = {
    ("export", "alias by .data"),
    ("export", "computed attribute"),
    ("export, not strict", "alias by .data"),
    ("export, not strict", "computed attribute"),
    ("jit.trace", "parameter of a module in a dict"),
    ("jit.trace, saved", "parameter of a module in a dict"),
    ("fx trace", "parameter of a module in a dict"),
    ("torch.save of its state", "parameter of a module in a dict"),
    ("stack_module_state", "parameter of a module in a dict"),
}
"""Way and target that plain PyTorch refuses, or that have nothing to do with each other."""
