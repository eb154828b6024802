"""Random constructors: a program is a list of steps, each a piece of init code that real models are made of.

A step draws its own arguments from a seed of its own, so a failing program shrinks by dropping steps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Step = Callable[["Built", random.Random], None]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


class Built(nn.Module):
    """The module that a program builds."""

    def __init__(self, program: list[tuple[str, int]]) -> None:
        super().__init__()
        self.log: list[object] = []
        self.add(torch.randn(3, 4))
        for name, seed in program:
            STEPS[name](self, random.Random(seed))

    def add(self, tensor: Tensor, kind: str = "parameter") -> Tensor:
        name = f"t{len(self._parameters) + len(self._buffers)}"
        if kind == "parameter":
            floats = tensor.is_floating_point() or tensor.is_complex()
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=floats))
        else:
            self.register_buffer(name, tensor.detach(), persistent=kind == "buffer")
        return tensor

    def add_any(self, tensor: Tensor, r: random.Random) -> None:
        self.add(tensor, r.choice(["parameter", "buffer", "scratch"]))

    def module(self, module: nn.Module) -> None:
        self.add_module(f"m{len(self._modules)}", module)

    def pick(self, r: random.Random, dims: int | None = None) -> nn.Parameter:
        """A float parameter that is there already; made if there is none of so many dimensions."""
        found = [
            p for p in self.parameters() if p.is_floating_point() and p.numel() and (dims is None or p.dim() == dims)
        ]
        if not found:
            made = self.add(torch.ones(*[r.randint(1, 4) for _ in range(dims or 2)]) * r.random())
            return next(p for p in self.parameters() if p.shape == made.shape)
        return r.choice(found)


def shape(r: random.Random, dims: int | None = None) -> tuple[int, ...]:
    return tuple(r.randint(1, 5) for _ in range(dims if dims is not None else r.randint(1, 3)))


def generator(r: random.Random) -> torch.Generator | None:
    return torch.Generator().manual_seed(r.randint(0, 99)) if r.random() < 0.4 else None


# -- torch.nn.init -----------------------------------------------------------------------------------------------------

INIT: dict[str, Callable[[Tensor, random.Random, torch.Generator | None], Tensor]] = {
    "uniform_": lambda t, r, g: nn.init.uniform_(t, -r.random(), r.random(), generator=g),
    "normal_": lambda t, r, g: nn.init.normal_(t, r.random(), r.random(), generator=g),
    "trunc_normal_": lambda t, r, g: nn.init.trunc_normal_(t, r.random(), 0.5, a=-1.0, b=2.0, generator=g),
    "constant_": lambda t, r, g: nn.init.constant_(t, r.random()),
    "ones_": lambda t, r, g: nn.init.ones_(t),
    "zeros_": lambda t, r, g: nn.init.zeros_(t),
    "eye_": lambda t, r, g: nn.init.eye_(t),
    "dirac_": lambda t, r, g: nn.init.dirac_(t),
    "xavier_uniform_": lambda t, r, g: nn.init.xavier_uniform_(t, gain=1 + r.random(), generator=g),
    "xavier_normal_": lambda t, r, g: nn.init.xavier_normal_(t, gain=1 + r.random(), generator=g),
    "kaiming_uniform_": lambda t, r, g: nn.init.kaiming_uniform_(t, a=r.random(), generator=g),
    "kaiming_normal_": lambda t, r, g: nn.init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu", generator=g),
    "orthogonal_": lambda t, r, g: nn.init.orthogonal_(t, gain=r.random(), generator=g),
    "sparse_": lambda t, r, g: nn.init.sparse_(t, sparsity=r.random(), std=0.1, generator=g),
}
DIMS = {"eye_": 2, "dirac_": 3, "sparse_": 2}


def _an_init(name: str) -> Step:
    def init(m: Built, r: random.Random) -> None:
        t = m.pick(r, DIMS.get(name, 2))
        g = generator(r)
        how = r.randint(0, 3)
        if name == "sparse_" and t.dtype in (torch.float16, torch.bfloat16):
            return
        if how == 0:
            INIT[name](t, r, g)
        elif how == 1:
            INIT[name](t.data, r, g)
        elif how == 2:
            m.add(INIT[name](torch.empty(shape(r, DIMS.get(name, 2))), r, g))
        else:
            with torch.no_grad():
                INIT[name](t.data[:1] if name != "dirac_" else t.data, r, g)

    return init


for _name in INIT:
    STEPS[_name] = _an_init(_name)


# -- writing in place --------------------------------------------------------------------------------------------------


@step
def in_place_random(m: Built, r: random.Random) -> None:
    names = ("normal_", "uniform_", "exponential_", "cauchy_", "log_normal_", "bernoulli_", "random_", "geometric_")
    name = r.choice(names)
    arguments = {"bernoulli_": (0.5,), "random_": (0, 9), "geometric_": (0.4,)}.get(name, ())
    target = m.pick(r).data
    target = r.choice([target, target.view(-1)[1:], target[0], target.reshape(-1)[:2]])
    getattr(target, name)(*arguments, generator=generator(r))


@step
def in_place_arithmetic(m: Built, r: random.Random) -> None:
    p = m.pick(r)
    with torch.no_grad():
        r.choice(
            [
                lambda: p.mul_(0.5),
                lambda: p.add_(torch.ones_like(p), alpha=0.1),
                lambda: p.clamp_(-0.5, 0.5),
                lambda: p.data.div_(2),
                lambda: p.data.neg_(),
                lambda: p.data.zero_(),
                lambda: p.data.fill_(r.random()),
                lambda: p.addcmul_(p, p, value=0.1),
                lambda: p.data.tanh_(),
                lambda: p.lerp_(torch.zeros_like(p), 0.25),
            ]
        )()


@step
def set_items(m: Built, r: random.Random) -> None:
    t = m.pick(r, 2).data
    r.choice(
        [
            lambda: t.__setitem__(0, 1.5),
            lambda: t.__setitem__((slice(None), -1), 0),
            lambda: t.__setitem__(0, torch.arange(float(t.shape[1])).to(t)),
            lambda: t.__setitem__(t > 0, 0.25),
            lambda: t.__setitem__(torch.tensor([0]), -1.0),
            lambda: t.index_fill_(0, torch.tensor([0]), 3.0),
            lambda: t[0].normal_(),
        ]
    )()


@step
def masks(m: Built, r: random.Random) -> None:
    t = m.pick(r, 2).data
    m.add_any(torch.where(t > 0, t, torch.zeros_like(t)), r)
    t.masked_fill_(t < -1, -1.0)
    m.add_any(torch.tril(torch.ones(3, 3)).masked_fill(torch.eye(3, dtype=torch.bool), float("-inf")), r)


@step
def index_put(m: Built, r: random.Random) -> None:
    t = torch.zeros(shape(r, 2))
    t.index_put_((torch.tensor([0, 0]),), torch.tensor(r.random()), accumulate=True)
    t.scatter_(1, torch.zeros(t.shape[0], 1, dtype=torch.long), 2.0)
    m.add_any(t, r)


@step
def copy_in(m: Built, r: random.Random) -> None:
    p = m.pick(r, 1)
    values = [r.random() for _ in range(p.numel())]
    r.choice(
        [
            lambda: p.data.copy_(torch.tensor(values)),
            lambda: p.data.copy_(torch.from_numpy(np.array(values, dtype=np.float32))),
            lambda: p.data.copy_(torch.randn(p.numel())),
            lambda: p.data[:1].copy_(p.data[-1:]),
        ]
    )()


@step
def data_set(m: Built, r: random.Random) -> None:
    p = m.pick(r, 2)
    p.data = r.choice(
        [
            lambda: torch.randn(shape(r, 2)),
            lambda: p.data.clone() * 2,
            lambda: p.data.t(),
            lambda: torch.from_numpy(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
            lambda: torch.tensor([[1.0, 2.0]]),
        ]
    )()


# -- making tensors ----------------------------------------------------------------------------------------------------


@step
def factories(m: Built, r: random.Random) -> None:
    size, g = shape(r), generator(r)
    m.add_any(
        r.choice(
            [
                lambda: torch.zeros(size),
                lambda: torch.ones(size, dtype=torch.float64),
                lambda: torch.full(size, r.random()),
                lambda: torch.arange(r.randint(1, 9)),
                lambda: torch.linspace(0, r.random(), r.randint(1, 9)),
                lambda: torch.logspace(0, 1, 4),
                lambda: torch.eye(3, r.randint(1, 4)),
                lambda: torch.rand(size, generator=g),
                lambda: torch.randn(size, generator=g),
                lambda: torch.randint(0, 9, size, generator=g),
                lambda: torch.randperm(7, generator=g),
                lambda: torch.normal(0.0, 1.0, size, generator=g),
                lambda: torch.normal(torch.zeros(size), torch.ones(size), generator=g),
                lambda: torch.bernoulli(torch.full(size, 0.5), generator=g),
                lambda: torch.multinomial(torch.ones(6), 3, generator=g),
                lambda: torch.tensor([1, 2, 3]),
                lambda: torch.tensor(r.random()),
                lambda: torch.as_tensor([True, False]),
                lambda: torch.zeros(0, 3),
                lambda: torch.hann_window(8),
            ]
        )(),
        r,
    )


@step
def arithmetic(m: Built, r: random.Random) -> None:
    t = m.pick(r, 2).detach()
    m.add_any(
        r.choice(
            [
                lambda: t * 2 + 1,
                lambda: t @ t.t(),
                lambda: t.softmax(-1),
                lambda: t.double(),
                lambda: t.sum(0),
                lambda: (t - t.mean()) / (t.std() + 1),
                lambda: torch.outer(t[0], t[:, 0]),
                lambda: t.cumsum(0),
                lambda: 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8)),
                lambda: torch.einsum("ij,kj->ik", t, t),
            ]
        )(),
        r,
    )


@step
def together(m: Built, r: random.Random) -> None:
    t = m.pick(r, 2).detach()
    m.add_any(
        r.choice(
            [
                lambda: torch.cat([t, torch.zeros(1, t.shape[1], dtype=t.dtype)]),
                lambda: torch.stack([t, t + 1]),
                lambda: torch.cat([t.flatten(), torch.randn(2).to(t)]),
                lambda: t.repeat(2, 1),
                lambda: torch.nn.functional.pad(t, (1, 0)),
                lambda: torch.vstack([t, torch.full_like(t, 2.0)]),
            ]
        )(),
        r,
    )


@step
def layouts(m: Built, r: random.Random) -> None:
    t = torch.randn(shape(r, 3))
    m.add_any(
        r.choice(
            [
                lambda: t.permute(2, 0, 1),
                lambda: t.transpose(0, 1).contiguous(),
                lambda: t[:1],
                lambda: t[..., ::2],
                lambda: t.flatten(),
                lambda: t[:, :1].expand(-1, 3, -1),
                lambda: torch.randn_like(t.permute(2, 0, 1)),
                lambda: t.permute(2, 0, 1).clone(),
            ]
        )(),
        r,
    )


@step
def complex_numbers(m: Built, r: random.Random) -> None:
    t = torch.randn(shape(r), dtype=torch.complex64)
    m.add_any(
        r.choice(
            [
                lambda: t,
                lambda: t.conj(),
                lambda: torch.polar(torch.ones(3), torch.arange(3.0)),
                lambda: torch.view_as_real(t),
                lambda: t.imag,
                lambda: t.conj().imag,
                lambda: torch.complex(torch.randn(3), torch.zeros(3)) * 2,
                lambda: torch.fft.fft(torch.randn(4)),
            ]
        )(),
        r,
    )


@step
def of_unknown_size(m: Built, r: random.Random) -> None:
    t = torch.randint(0, 3, (8,))
    m.add_any(
        r.choice(
            [
                lambda: t.unique(),
                lambda: t.nonzero(),
                lambda: t[t > 0],
                lambda: torch.masked_select(t, t == 1),
                lambda: torch.unique(t, return_counts=True)[1],
                lambda: torch.where(t > 0)[0],
            ]
        )(),
        r,
    )


# -- values that the constructor looks at ------------------------------------------------------------------------------


@step
def looks_at_values(m: Built, r: random.Random) -> None:
    t = torch.rand(4) if r.random() < 0.5 else m.pick(r).detach().flatten()
    m.log.append([x.item() for x in torch.linspace(0, r.random(), 3)])
    m.log.append(t.tolist())
    if (t > 0.5).any():
        m.add_any(torch.randn(2), r)
    if t[0].item() > 0.25:
        m.add_any(torch.full((int(t.numel()),), float(t.max())), r)
    m.log.append(bool(torch.equal(t, t.clone())))
    m.log.append(t.numpy().sum().item())


# -- seeds -------------------------------------------------------------------------------------------------------------


@step
def seeds(m: Built, r: random.Random) -> None:
    torch.manual_seed(r.randint(0, 3))
    m.add_any(torch.randn(shape(r)), r)


@step
def forks(m: Built, r: random.Random) -> None:
    with torch.random.fork_rng(devices=[]):
        if r.random() < 0.5:
            torch.manual_seed(r.randint(0, 3))
        m.add_any(torch.rand(shape(r)), r)
    m.add_any(torch.randn(2), r)


@step
def rewinds(m: Built, r: random.Random) -> None:
    state = torch.get_rng_state()
    m.add_any(torch.randn(shape(r)), r)
    if r.random() < 0.5:
        torch.set_rng_state(state)
    m.add_any(torch.randn(shape(r)), r)


@step
def one_generator_for_many(m: Built, r: random.Random) -> None:
    g = torch.Generator().manual_seed(r.randint(0, 3))
    for _ in range(3):
        m.add_any(torch.randn(shape(r), generator=g), r)
    m.add_any(torch.randperm(4, generator=g), r)


# -- modules -----------------------------------------------------------------------------------------------------------


@step
def layers(m: Built, r: random.Random) -> None:
    m.module(
        r.choice(
            [
                lambda: nn.Linear(3, 4),
                lambda: nn.Linear(3, 4, dtype=torch.bfloat16),
                lambda: nn.Embedding(5, 3, padding_idx=r.choice([None, 1])),
                lambda: nn.LSTM(3, 4, 2, bidirectional=r.random() < 0.5),
                lambda: nn.GRU(2, 3),
                lambda: nn.RNNCell(2, 3),
                lambda: nn.MultiheadAttention(4, 2),
                lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True),
                lambda: nn.Conv1d(2, 4, 3),
                lambda: nn.Conv2d(2, 3, 3, bias=False).to(memory_format=torch.channels_last),
                lambda: nn.ConvTranspose2d(2, 3, 2),
                lambda: nn.BatchNorm1d(3),
                lambda: nn.LayerNorm(4),
                lambda: nn.GroupNorm(2, 4),
                lambda: nn.Bilinear(2, 3, 4),
                lambda: nn.TransformerEncoderLayer(4, 2, 8),
                lambda: nn.Linear(2, 2).half().float(),
                lambda: nn.Linear(2, 2).double(),
                lambda: nn.ParameterList([torch.randn(2), nn.Parameter(torch.zeros(1))]),
                lambda: nn.ParameterDict({"a": torch.randn(2)}),
            ]
        )()
    )


@step
def parametrized(m: Built, r: random.Random) -> None:
    m.module(
        r.choice(
            [
                lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
                lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
                lambda: parametrizations.orthogonal(nn.Linear(3, 4), orthogonal_map="householder"),
                lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
                lambda: parametrizations.spectral_norm(nn.Conv1d(2, 3, 2), n_power_iterations=2),
            ]
        )()
    )


@step
def ties(m: Built, r: random.Random) -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    m.module(nn.ModuleList([embedding, head]))
    p = m.pick(r)
    m.register_parameter(f"t{len(m._parameters) + len(m._buffers)}", p)


@step
def views_of_one_memory(m: Built, r: random.Random) -> None:
    t = torch.randn(4, 3)
    m.add(t[:2])
    m.add(t[2:])
    m.add(t.t(), "buffer")


@step
def copies(m: Built, r: random.Random) -> None:
    part = next(iter(m._modules.values()), None)
    m.module(copy.deepcopy(part) if part is not None and r.random() < 0.7 else copy.deepcopy(nn.Linear(2, 3)))


@step
def loads_a_state_dict(m: Built, r: random.Random) -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.load_state_dict(one.state_dict(), assign=r.random() < 0.5)
    m.module(other)


@step
def freezes(m: Built, r: random.Random) -> None:
    m.pick(r).requires_grad_(False)


@step
def plain_attributes(m: Built, r: random.Random) -> None:
    held: Any = [torch.randn(2), {"a": torch.arange(3)}]
    setattr(m, f"held{len(vars(m))}", held)
    setattr(m, f"also{len(vars(m))}", m.pick(r))


@step
def train_flags(m: Built, r: random.Random) -> None:
    m.train(r.random() < 0.5)


@step
def moves_about(m: Built, r: random.Random) -> None:
    m.to("cpu")
    p = m.pick(r)
    m.log.append([str(p.device), p.is_meta, p.to("cpu") is p])
    m.add_any(p.detach().to(torch.float64).to("cpu"), r)
