"""Ways of touching a tensor, and a model that computes with it. Each returns what it got out of it."""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.never_empty.targets import SIZE, Target

X = torch.linspace(-1, 1, 2 * SIZE).view(2, SIZE)
ROWS = torch.tensor([0, 3])
CHECKED = torch.tensor([[True, False] * 2, [False, True] * 2] * 2)


class Case:
    """One model, the tensor in it that is touched, and a real tensor beside it that must not take up garbage."""

    def __init__(self, model: Target) -> None:
        self.model = model
        self.real = torch.ones(SIZE, SIZE)

    @property
    def t(self) -> Tensor:
        return self.model.held()


Way = Callable[[Case], Any]


def loaded_again(tensor: Any) -> Any:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _at_its_address(tensor: Tensor, ask: Callable[[Tensor], int]) -> list[float]:
    address = ask(tensor)
    assert address, "a null pointer"
    return sorted((ctypes.c_float * tensor.numel()).from_address(address))


def in_thread(use: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(use).result()


def _loaded_into(tensor: Tensor, *, assign: bool) -> Tensor:
    linear = nn.Linear(SIZE, SIZE, bias=False)
    linear.load_state_dict({"weight": tensor}, assign=assign)
    return linear(X)


def _set_as_data(tensor: Tensor) -> Tensor:
    linear = nn.Linear(SIZE, SIZE, bias=False)
    linear.weight.data = tensor
    return linear(X)


def _set_as_parameter(tensor: Tensor) -> Tensor:
    linear = nn.Linear(SIZE, SIZE, bias=False)
    linear.weight = nn.Parameter(tensor)
    return linear(X)


def _gradient(tensor: Tensor) -> Tensor | None:
    x = X.clone().requires_grad_()
    (x @ tensor).sum().backward()
    return x.grad


def _func_linear(tensor: Tensor) -> Tensor:
    linear = nn.Linear(SIZE, SIZE)
    return torch.func.functional_call(linear, {"weight": tensor, "bias": torch.ones(SIZE)}, X)


def _optimized(tensor: Tensor, optimizer: Callable[..., torch.optim.Optimizer]) -> Tensor:
    leaf = tensor if tensor.is_leaf else tensor.detach()
    leaf.requires_grad_()
    leaf.grad = torch.ones(SIZE, SIZE)
    optimizer([leaf], lr=0.5).step()
    return leaf.detach().clone()


def _into(real: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(real)
    return real


def _twice(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        tensor.mul_(2.0)
    return tensor.detach().clone()


OPERATORS: dict[str, Way] = {
    "F.linear": lambda c: F.linear(X, c.t),
    "matmul": lambda c: X @ c.t,
    "matmul from the left": lambda c: c.t @ c.real,
    "addmm": lambda c: torch.addmm(c.real, c.real, c.t),
    "bmm": lambda c: torch.bmm(c.real[None], c.t[None]),
    "einsum": lambda c: torch.einsum("ij,kj->ik", X, c.t),
    "conv1d": lambda c: F.conv1d(torch.ones(1, SIZE, 5), c.t.view(SIZE, SIZE, 1)),
    "conv_transpose2d": lambda c: F.conv_transpose2d(torch.ones(1, SIZE, 3, 3), c.t.view(SIZE, SIZE, 1, 1)),
    "F.embedding": lambda c: F.embedding(ROWS, c.t),
    "F.embedding_bag": lambda c: F.embedding_bag(ROWS, c.t, torch.tensor([0])),
    "layer_norm": lambda c: F.layer_norm(X, (SIZE,), c.t[0], c.t[1]),
    "batch_norm": lambda c: F.batch_norm(X, c.t.detach()[0], c.t.detach()[1]),
    "attention": lambda c: F.scaled_dot_product_attention(c.real[None], c.real[None], c.t[None]),
    "index": lambda c: c.t[ROWS],
    "index by a mask": lambda c: c.t[CHECKED],
    "as an index": lambda c: c.real.cumsum(0)[(c.t * 2).long().clamp(max=3)],
    "slice": lambda c: c.t[1:3].sum(),
    "gather": lambda c: c.t.gather(1, ROWS.expand(SIZE, 2)),
    "index_select": lambda c: c.t.index_select(0, ROWS),
    "take": lambda c: c.t.take(ROWS),
    "masked_select": lambda c: c.t.masked_select(CHECKED),
    "masked_fill": lambda c: c.t.masked_fill(CHECKED, 0.0),
    "where": lambda c: torch.where(CHECKED, c.real, c.t),
    "where by a condition": lambda c: torch.where(c.t > 0.5, c.real, 2.0),
    "cat": lambda c: torch.cat([c.real, c.t]),
    "stack": lambda c: torch.stack([c.t, c.real]),
    "sum": lambda c: c.t.sum(),
    "topk": lambda c: c.t.topk(2).values,
    "nonzero": lambda c: (c.t > 0.5).nonzero(),
    "unique": lambda c: c.t.unique(),
    "svd": lambda c: torch.linalg.svdvals(c.t),
    "equal": lambda c: torch.equal(c.t, c.real),
    "allclose": lambda c: torch.allclose(c.t, c.real),
    "foreach": lambda c: torch._foreach_add([c.t, c.real], 1.0)[0],
    "default_collate": lambda c: torch.utils.data.default_collate([c.t[0], c.real[0]]),
    "parameters_to_vector": lambda c: nn.utils.parameters_to_vector([c.t, c.real]) * 2,
    "gradient of its product": lambda c: _gradient(c.t),
    "without gradients": lambda c: torch.no_grad()(F.linear)(X, c.t),
    "inference_mode": lambda c: torch.inference_mode()(F.linear)(X, c.t).clone(),
    "autocast": lambda c: torch.autocast("cpu", torch.bfloat16)(F.linear)(X, c.t).float(),
}

WRITES_OF_REAL_TENSORS: dict[str, Way] = {
    "real.add_": lambda c: c.real.add_(c.t.detach()),
    "real.mul_": lambda c: c.real.mul_(c.t.detach()),
    "real.addmm_": lambda c: c.real.addmm_(c.real.clone(), c.t.detach()),
    "real.addcmul_": lambda c: c.real.addcmul_(c.t.detach(), c.real.clone()),
    "real.lerp_": lambda c: c.real.lerp_(c.t.detach(), 0.5),
    "real.copy_": lambda c: c.real.copy_(c.t.detach()),
    "real[0] =": lambda c: _into(c.real, lambda real: real.__setitem__(0, c.t.detach()[0])),
    "real[rows] =": lambda c: _into(c.real, lambda real: real.__setitem__(ROWS, c.t.detach()[ROWS])),
    "real[mask] = element": lambda c: _into(c.real, lambda real: real.__setitem__(CHECKED, c.t.detach()[0, 1])),
    "real.masked_fill_ by a mask": lambda c: c.real.masked_fill_(c.t > 0.5, 0.0),
    "real.masked_fill_ with an element": lambda c: c.real.masked_fill_(CHECKED, c.t.detach()[0, 1]),
    "real.masked_scatter_": lambda c: c.real.masked_scatter_(CHECKED, c.t.detach()),
    "real.index_copy_": lambda c: c.real.index_copy_(0, ROWS, c.t.detach()[:2]),
    "real.index_add_": lambda c: c.real.index_add_(0, ROWS, c.t.detach()[:2]),
    "real.scatter_": lambda c: c.real.scatter_(1, ROWS.expand(SIZE, 2), c.t.detach()),
    "real.fill_": lambda c: c.real.fill_(c.t.detach()[0, 1]),
    "real.clamp_": lambda c: c.real.clamp_(max=c.t.detach()),
    "out=": lambda c: torch.add(c.t.detach(), 1.0, out=c.real),
    "_foreach_copy_": lambda c: _into(c.real, lambda real: torch._foreach_copy_([real], [c.t.detach()])),
    "real.set_": lambda c: torch.empty(0).set_(c.t.detach()) * 2,
    "p.data =": lambda c: _set_as_data(c.t.detach()),
    "a plain model's load_state_dict": lambda c: _loaded_into(c.t.detach(), assign=False),
    "a plain model's load_state_dict(assign=True)": lambda c: _loaded_into(c.t.detach(), assign=True),
    "Embedding.from_pretrained": lambda c: nn.Embedding.from_pretrained(c.t.detach())(ROWS),
    "nn.Parameter": lambda c: _set_as_parameter(c.t.detach()),
}

VALUES: dict[str, Way] = {
    "numpy": lambda c: c.t.detach().numpy(),
    "numpy(force=True)": lambda c: c.t.numpy(force=True),
    "np.asarray": lambda c: np.asarray(c.t.detach()),
    "numpy ufunc": lambda c: np.add(c.t.detach(), np.ones((SIZE, SIZE), np.float32)),
    "tolist": lambda c: c.t.tolist(),
    "item": lambda c: c.t[1, 2].item(),
    "bool": lambda c: bool(c.t[1, 2] > 0.5),
    "float": lambda c: float(c.t.detach()[1, 2]),
    "int": lambda c: int(c.t.detach()[3, 3]),
    "complex": lambda c: complex(c.t.detach()[1, 2]),
    "format": lambda c: f"{c.t.detach()[1, 2]:.3f}",
    "math.sqrt": lambda c: math.sqrt(c.t.detach()[1, 2]),
    "iteration": lambda c: [float(v) for row in c.t.detach() for v in row],
    "unpacking": lambda c: [t.sum() for t in c.t.unbind()],
    "in": lambda c: 0.125 in c.t.detach(),
    "torch.tensor": lambda c: torch.tensor(c.t.tolist()),
    "torch.tensor of elements": lambda c: torch.tensor([c.t.detach()[0, 1], c.t.detach()[1, 2]]),
    "torch.as_tensor": lambda c: torch.as_tensor(c.t) * 2,
    "asarray": lambda c: torch.asarray(c.t.detach(), copy=True) * 2,
    "dlpack": lambda c: torch.from_dlpack(c.t.detach()) * 2,
    "np.from_dlpack": lambda c: np.from_dlpack(c.t.detach()),
    "data_ptr": lambda c: _at_its_address(c.t, lambda t: t.data_ptr()),
    "untyped_storage().data_ptr": lambda c: _at_its_address(c.t, lambda t: t.untyped_storage().data_ptr()),
    "untyped_storage().tolist": lambda c: c.t.untyped_storage().tolist(),
    "untyped_storage().clone": lambda c: c.t.untyped_storage().clone().tolist(),
    "pickle": lambda c: pickle.loads(pickle.dumps(c.t.detach())),
    "torch.save": lambda c: loaded_again(c.t.detach()),
    "torch.save in a dict": lambda c: loaded_again({"x": [c.t.detach()]})["x"],
    "safetensors.save": lambda c: safetensors.torch.load(safetensors.torch.save({"x": c.t.detach().contiguous()}))["x"],
    "share_memory_": lambda c: c.t.detach().clone().share_memory_() * 2,
}

COPIES: dict[str, Way] = {
    "copy.copy": lambda c: copy.copy(c.t.detach()) * 2 @ X.t(),
    "deepcopy": lambda c: copy.deepcopy(c.t.detach()) @ X.t(),
    "clone": lambda c: c.t.clone() @ X.t(),
    "detach": lambda c: c.t.detach() @ X.t(),
    "double": lambda c: c.t.double() @ X.t().double(),
    "half": lambda c: c.t.half().float() @ X.t(),
    "to int8": lambda c: (c.t * 100).to(torch.int8).tolist(),
    "view as int32": lambda c: c.t.view(torch.int32).tolist(),
    "to the cpu": lambda c: c.t.to("cpu") @ X.t(),
    "transposed": lambda c: X @ c.t.t().contiguous(),
    "expanded": lambda c: c.t.expand(2, SIZE, SIZE).sum(0),
    "nan_to_num": lambda c: c.t.nan_to_num(7.0) @ X.t(),
    "mul_ in place": lambda c: _twice(c.t),
    "clamp_ in place": lambda c: c.t.detach().clamp_(0.5, 1.0).tolist(),
    "nan_to_num_ in place": lambda c: c.t.detach().nan_to_num_(7.0).tolist(),
    "SGD": lambda c: _optimized(c.t, torch.optim.SGD),
    "AdamW": lambda c: _optimized(c.t, torch.optim.AdamW),
    "Adam without foreach": lambda c: _optimized(c.t, lambda p, lr: torch.optim.Adam(p, lr=lr, foreach=False)),
    "thread": lambda c: in_thread(lambda: F.linear(X, c.t)),
    "functional_call": lambda c: _func_linear(c.t),
    "vmap": lambda c: torch.func.vmap(lambda row: row * 2)(c.t),
    "vmap beside real": lambda c: torch.func.vmap(torch.dot)(c.t, c.real),
    "vmap with it inside": lambda c: torch.func.vmap(lambda x: c.t @ x)(X),
    "func.grad": lambda c: torch.func.grad(lambda t: (t * t).sum())(c.t.detach()),
    "jvp": lambda c: torch.func.jvp(lambda t: t * t, (c.t.detach(),), (c.real,))[1],
}
