"""The expected mean and standard deviation of a tensor: derived from the tape, or measured by replaying it alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fabric_init.recording.replay.replay import replay_with, view
from fabric_init.recording.tape.liveness import live_ops
from fabric_init.recording.tape.op_properties import INIT_FUNCTIONS
from fabric_init.recording.tape.tape import Constant, Op, Tape, TensorRef
from fabric_init.reports.statistics import Moments, measured, mixture, of_init_function, uniform
from fabric_init.reports.write_history import byte_span, spans_overlap

_MOST_MEASURED = 1 << 24
"""The most elements that the replay of a tensor may write: well under a second, and 64 MB."""

_CPU = torch.device("cpu")


class Expectations:
    """The expected moments of the tensors on a tape. Equal rules are measured once."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._measured: dict[Any, Moments | None] = {}

    def of(self, ref: TensorRef) -> Moments | None:
        """Return the moments of the final value of ``ref``; ``None`` if they are unknown."""
        return self.of_rules(ref) or (self._measure(ref) if _has_moments(ref) else None)

    def of_rules(self, ref: TensorRef) -> Moments | None:
        """Return the same as far as it can be derived: nothing is run."""
        try:
            return _finite(self._of(ref, None)) if _has_moments(ref) else None
        except RecursionError:  # a chain of a thousand ops has to be measured
            return None

    def of_op(self, op: Op, target: TensorRef) -> Moments | None:
        """Return the moments that ``op`` leaves in ``target``, as far as they can be derived."""
        try:
            return _finite(self._result(op, target)) if target.size.numel() else None
        except RecursionError:
            return None

    def _of(self, ref: TensorRef, before: int | None) -> Moments | None:
        parts: dict[TensorRef, Moments] = {}
        for number in reversed(self._tape.writers.get(ref.storage, ())):
            if before is not None and number >= before:
                continue
            op = self._tape.ops[number]
            target = next((each for each in (*op.targets, *op.outputs) if each.storage == ref.storage), None)
            if target is None or target.dtype != ref.dtype:
                return None
            if not spans_overlap(target, ref) or target in parts:
                continue
            value = self._result(op, target)
            if value is None:
                return None
            if target.size.numel() >= ref.size.numel():
                return _combined(ref, parts, value)
            parts[target] = value
        return _combined(ref, parts, None)

    def _result(self, op: Op, target: TensorRef) -> Moments | None:
        name = getattr(op.func, "__name__", "")
        if INIT_FUNCTIONS.get(name) is op.func:
            return of_init_function(op.func, target.size, dict(op.kwargs))
        schema = op.func._schema  # type: ignore[attr-defined]
        rule = _ATEN.get(schema.name.removeprefix("aten::"))
        if rule is None:
            return None
        arguments = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
        arguments |= dict(zip((each.name for each in schema.arguments), op.args, strict=False)) | dict(op.kwargs)
        return rule(_InitCall(self, op, arguments))

    def operand(self, op: Op, value: Any) -> Moments | None:
        """Return the moments of an argument of ``op`` at the time that it ran."""
        if isinstance(value, TensorRef):
            return self._of(value, op.number) if _has_moments(value) else None
        if isinstance(value, Constant):
            return moments(value.tensor)
        if isinstance(value, (bool, int, float)):
            return Moments(float(value), 0.0)
        return None

    def _measure(self, ref: TensorRef) -> Moments | None:
        live = [self._tape.ops[number] for number in sorted(live_ops(self._tape, [ref.storage], exact=False))]
        work = sum(each.size.numel() for op in live for each in (*op.targets, *op.outputs))
        if not live or work > _MOST_MEASURED:
            return None
        key = _shape_of_work(live, ref)
        if key not in self._measured:
            memory = replay_with(self._tape, [ref.storage], {}, exact=False, to=lambda device: _CPU)[ref.storage]
            self._measured[key] = moments(view(memory, ref))
        return self._measured[key]


def _combined(ref: TensorRef, parts: dict[TensorRef, Moments], rest: Moments | None) -> Moments | None:
    """Return the moments of ``ref`` from the last write to each of its parts, and the full write before those."""
    spans = sorted(map(byte_span, parts))
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        return None  # parts that overlap need their values
    left = ref.size.numel() - sum(part.size.numel() for part in parts)
    if left < 0 or (left and rest is None):
        return None
    known = [(part.size.numel(), value) for part, value in parts.items()]
    return mixture([*known, (left, rest)] if rest is not None else known)


def moments(tensor: torch.Tensor) -> Moments | None:
    """Return the moments of a real tensor; ``None`` for complex, empty or not finite ones."""
    return _finite(measured(tensor))


def _finite(value: Moments | None) -> Moments | None:
    return value if value is not None and math.isfinite(value.mean) and math.isfinite(value.std) else None


def _has_moments(ref: TensorRef) -> bool:
    return ref.size.numel() > 0 and not ref.dtype.is_complex


def _shape_of_work(ops: list[Op], ref: TensorRef) -> Any:
    """Return a key that is equal for tensors written by the same ops on the same shapes, apart from random numbers."""
    places: dict[int, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return (places.setdefault(value.storage, len(places)), *value[1:])
        if isinstance(value, Constant):
            return id(value.tensor)
        if isinstance(value, (list, tuple)):
            return tuple(plain(item) for item in value)
        return repr(value)

    return plain(ref), tuple(
        (op.func, plain(op.args), tuple((name, plain(value)) for name, value in op.kwargs.items()), plain(op.outputs))
        for op in ops
    )


# -- aten ops ----------------------------------------------------------------------------------------------------------


class _InitCall(NamedTuple):
    expectations: Expectations
    op: Op
    arguments: dict[str, Any]

    def operand(self, name: str) -> Moments | None:
        return self.expectations.operand(self.op, self.arguments.get(name))

    def number(self, name: str) -> float:
        value = self.arguments[name]
        return float(value)


def _constant(value: float) -> Callable[[_InitCall], Moments | None]:
    return lambda call: Moments(value, 0.0)


def _affine(factor: Callable[[float], float] | None, sign: float = 0.0) -> Callable[[_InitCall], Moments | None]:
    """``x · factor(other)``, or ``x + sign · alpha · other``, where ``other`` is the same for every element."""

    def rule(call: _InitCall) -> Moments | None:
        value, other = call.operand("self"), call.operand("other")
        if value is None or other is None or other.std:
            return None
        if factor is None:
            return value.scaled(1.0, sign * float(call.arguments.get("alpha", 1)) * other.mean)
        return value.scaled(factor(other.mean)) if other.mean else None

    return rule


def _joined(call: _InitCall) -> Moments | None:
    refs = call.arguments["tensors"]
    parts = [(ref, call.expectations.operand(call.op, ref)) for ref in refs]
    known = [(float(_elements(ref)), value) for ref, value in parts if value is not None]
    return mixture(known) if known and len(known) == len(parts) else None


def _elements(value: TensorRef | Constant) -> int:
    return value.size.numel() if isinstance(value, TensorRef) else value.tensor.numel()


_ATEN: dict[str, Callable[[_InitCall], Moments | None]] = {
    **dict.fromkeys(("zero_", "zeros", "zeros_like", "new_zeros"), _constant(0.0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1.0)),
    "fill_": lambda call: call.operand("value"),
    **dict.fromkeys(("full", "full_like", "new_full"), lambda call: call.operand("fill_value")),
    **dict.fromkeys(("rand", "rand_like"), lambda call: uniform(0.0, 1.0)),
    **dict.fromkeys(("randn", "randn_like"), lambda call: Moments(0.0, 1.0)),
    "uniform_": lambda call: uniform(call.number("from"), call.number("to")),
    "normal_": lambda call: Moments(call.number("mean"), call.number("std")),
    "exponential_": lambda call: Moments(1 / call.number("lambd"), 1 / call.number("lambd")),
    **dict.fromkeys(("clone", "_to_copy", "lift_fresh_copy"), lambda call: call.operand("self")),
    "copy_": lambda call: call.operand("src"),
    **dict.fromkeys(("mul", "mul_"), _affine(lambda other: other)),
    **dict.fromkeys(("div", "div_"), _affine(lambda other: 1 / other)),
    **dict.fromkeys(("add", "add_"), _affine(None, 1.0)),
    **dict.fromkeys(("sub", "sub_"), _affine(None, -1.0)),
    **dict.fromkeys(("neg", "neg_"), lambda call: value.scaled(-1.0) if (value := call.operand("self")) else None),
    **dict.fromkeys(("cat", "stack"), _joined),
}
