"""Digests of a plan, by which ranks make sure that they do the same: what each tensor gets, and how it is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fabric_init.planning.plan import Action
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import TensorInfo, find_tensors
from fabric_init.recording.tape.liveness import live_ops
from fabric_init.recording.tape.tape import Constant, Op, Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import recorded

_PLAIN = (int, float, complex, str, bool, torch.dtype)


def plan_lines(prepared: PreparedPlan, *, sharded: bool | None = None) -> dict[str, str]:
    """Return for each tensor of a plan, by name, a text that differs where ranks would not give it the same.

    Args:
        prepared: The plan.
        sharded: Whether each rank gives a part of a tensor its values, so that rules and constants of its init have to
            be the same, too. Otherwise the strategy sends one rank's values where those differ. ``None`` means: if
            some are DTensors.
    """
    entries = prepared.plan.plain
    if sharded is None:
        sharded = any(isinstance(tensor, DTensor) for tensor in prepared.tensors)
    made = [e.slot.ref for e in entries if e.action in (Action.INIT, Action.WAIT) and e.slot.ref is not None]
    rules = _rules(made, prepared.tapes, exact=prepared.exact) if sharded else {}
    return {
        entry.slot.name: f"{entry.slot.names} {entry.slot.kind} {tuple(entry.slot.shape)} {entry.slot.dtype} "
        f"{entry.action} {entry.keys} {entry.cast_from} {rules.get(entry.slot.ref, '')}"
        for entry in entries
    }


def init_lines(model: nn.Module) -> dict[str, str]:
    """Return for each recorded tensor of ``model``, by name, how its own init computes it."""
    tapes: dict[int, Tape] = {}
    infos: dict[TensorRef, TensorInfo] = {}
    for info, tensor in find_tensors(model):
        if info.ref is not None and (found := recorded(tensor)) is not None:
            infos[info.ref], tapes[info.ref.storage] = info, found.tape
    rules = _rules(infos, tapes, exact={tape.rng for tape in tapes.values()} == {"eager"})
    return {name: f"{rules[ref]} {info.kind}" for ref, info in infos.items() for name in info.names}


def sharded_lines(prepared: PreparedPlan) -> dict[str, str]:
    """Return :func:`plan_lines` for a model that is sharded after it was planned for."""
    return plan_lines(prepared, sharded=True)


def _rules(refs: Iterable[TensorRef], tapes: Mapping[int, Tape], *, exact: bool) -> dict[TensorRef | None, str]:
    """Return how each of these tensors is computed, hashed: every op of it with its arguments, however numbered."""
    wanted: dict[Tape, list[TensorRef]] = {}
    for ref in refs:
        wanted.setdefault(tapes[ref.storage].current(), []).append(ref)
    found: dict[TensorRef | None, str] = {}
    for tape, its in wanted.items():
        values = _Values(tape)
        for number in sorted(live_ops(tape, {ref.storage for ref in its}, exact=exact)):
            values.add(tape.ops[number])
        found.update((ref, values.text(ref)) for ref in its)
    return found


class _Values:
    """What the storages of a tape hold after some of its ops, as hashes of how it was computed."""

    def __init__(self, tape: Tape) -> None:
        self._streams = {number: order for order, number in enumerate(sorted(tape.streams))}
        self._held: dict[int, str] = {}
        self._constants: dict[int, str] = {}

    def add(self, op: Op) -> None:
        name = getattr(op.func, "__qualname__", None) or str(op.func)
        text = f"{name} {self._in(op.args)} {self._in(op.kwargs)} {op.default_dtype} {self._drawn(op)}"
        for order, ref in enumerate((*op.targets, *op.outputs)):
            held = f"{self._held.get(ref.storage, '')} {text} {order}"
            self._held[ref.storage] = hashlib.blake2b(held.encode(), digest_size=8).hexdigest()

    def text(self, ref: TensorRef) -> str:
        return f"{self._held.get(ref.storage, '')} {ref.offset} {tuple(ref.size)} {ref.stride} {ref.dtype}"

    def _drawn(self, op: Op) -> str:
        if op.draw is None:
            return ""
        return f"{self._streams[op.draw.stream]} {op.draw.position}"  # the seed becomes that of the first rank

    def _in(self, value: Any) -> str:
        if value is None or type(value) in _PLAIN:  # most are
            return repr(value)
        if isinstance(value, TensorRef):
            return self.text(value)
        if isinstance(value, Constant):
            return self._constant(value.tensor)
        if isinstance(value, torch.device):
            return value.type  # its number is the rank's own
        if isinstance(value, Mapping):
            return " ".join([f"{key}={self._in(its)}" for key, its in value.items()])
        if isinstance(value, (list, tuple)):
            return f"({' '.join([self._in(each) for each in value])})"
        return repr(value) if isinstance(value, _PLAIN) else type(value).__name__

    def _constant(self, tensor: torch.Tensor) -> str:
        if id(tensor) not in self._constants:
            held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = hashlib.blake2b(held.numpy().data, digest_size=8).hexdigest()
            self._constants[id(tensor)] = f"{tuple(tensor.shape)} {tensor.dtype} {digest}"
        return self._constants[id(tensor)]
