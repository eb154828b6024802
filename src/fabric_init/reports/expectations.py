"""Mean and standard deviation that a tensor will have: worked out from the tape, or measured on that tensor alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fabric_init.recording.op_schemas import INIT_FUNCTIONS
from fabric_init.recording.replay import replay_with, view
from fabric_init.recording.tape import Constant, Op, Tape, TensorRef
from fabric_init.reports.statistics import Moments, measured, mixture, of_init_function, uniform
from fabric_init.reports.write_history import byte_span, spans_overlap

_MOST_MEASURED = 1 << 24
"""Elements that one tensor's own replay may write: well under a second, and 64 MB."""

_CPU = torch.device("cpu")


class Expectations:
    """What the tape of a model gives its tensors. Equal rules are worked out once."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._measured: dict[Any, Moments | None] = {}

    def of(self, ref: TensorRef) -> Moments | None:
        """What ``ref`` will hold in the end; ``None`` if it cannot be told."""
        return self.of_rules(ref) or (self._measure(ref) if _has_moments(ref) else None)

    def of_rules(self, ref: TensorRef) -> Moments | None:
        """The same, as far as it can be worked out: nothing is run."""
        try:
            return _finite(self._of(ref, None)) if _has_moments(ref) else None
        except RecursionError:  # computed in a thousand steps: measuring is the way
            return None

    def of_op(self, op: Op, target: TensorRef) -> Moments | None:
        """What ``op`` leaves in ``target``, as far as it can be worked out."""
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
            target = next((one for one in (*op.targets, *op.outputs) if one.storage == ref.storage), None)
            if target is None or target.dtype != ref.dtype:
                return None
            if not spans_overlap(target, ref) or target in parts:
                continue
            value = self._result(op, target)
            if value is None:
                return None
            if target.size.numel() >= ref.size.numel():
                return _together(ref, parts, value)
            parts[target] = value
        return _together(ref, parts, None)

    def _result(self, op: Op, target: TensorRef) -> Moments | None:
        name = getattr(op.func, "__name__", "")
        if INIT_FUNCTIONS.get(name) is op.func:
            return of_init_function(op.func, target.size, dict(op.kwargs))
        schema = op.func._schema  # type: ignore[attr-defined]
        rule = _ATEN.get(schema.name.removeprefix("aten::"))
        if rule is None:
            return None
        given = {one.name: one.default_value for one in schema.arguments if one.has_default_value()}
        given |= dict(zip((one.name for one in schema.arguments), op.args, strict=False)) | dict(op.kwargs)
        return rule(_InitCall(self, op, given))

    def operand(self, op: Op, value: Any) -> Moments | None:
        """An argument of ``op``, as it was when that ran."""
        if isinstance(value, TensorRef):
            return self._of(value, op.number) if _has_moments(value) else None
        if isinstance(value, Constant):
            return moments(value.tensor)
        if isinstance(value, (bool, int, float)):
            return Moments(float(value), 0.0)
        return None

    def _measure(self, ref: TensorRef) -> Moments | None:
        live = [self._tape.ops[number] for number in sorted(self._tape.live([ref.storage], exact=False))]
        work = sum(one.size.numel() for op in live for one in (*op.targets, *op.outputs))
        if not live or work > _MOST_MEASURED:
            return None
        key = _shape_of_work(live, ref)
        if key not in self._measured:
            memory = replay_with(self._tape, ref.storage, {}, exact=False, to=lambda device: _CPU)
            self._measured[key] = moments(view(memory, ref))
        return self._measured[key]


def _together(ref: TensorRef, parts: dict[TensorRef, Moments], rest: Moments | None) -> Moments | None:
    """Of ``ref``, from the last write to each of its parts, and the one before those to all of it."""
    spans = sorted(map(byte_span, parts))
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        return None  # parts that overlap cannot be told apart without their values
    left = ref.size.numel() - sum(part.size.numel() for part in parts)
    if left < 0 or (left and rest is None):
        return None
    known = [(part.size.numel(), one) for part, one in parts.items()]
    return mixture([*known, (left, rest)] if rest is not None else known)


def moments(tensor: torch.Tensor) -> Moments | None:
    """Of a real tensor's elements; ``None`` for complex numbers, no elements, or values that are not finite."""
    return _finite(measured(tensor))


def _finite(found: Moments | None) -> Moments | None:
    return found if found is not None and math.isfinite(found.mean) and math.isfinite(found.std) else None


def _has_moments(ref: TensorRef) -> bool:
    return ref.size.numel() > 0 and not ref.dtype.is_complex


def _shape_of_work(ops: list[Op], ref: TensorRef) -> Any:
    """Equal for tensors that the same ops on the same shapes have written: only their random numbers differ."""
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
    given: dict[str, Any]

    def operand(self, name: str) -> Moments | None:
        return self.expectations.operand(self.op, self.given.get(name))

    def number(self, name: str) -> float:
        value = self.given[name]
        return float(value)


def _constant(value: float) -> Callable[[_InitCall], Moments | None]:
    return lambda call: Moments(value, 0.0)


def _affine(factor: Callable[[float], float] | None, sign: float = 0.0) -> Callable[[_InitCall], Moments | None]:
    """``x · factor(other)``, or ``x + sign · alpha · other``, where ``other`` is the same for every element."""

    def rule(call: _InitCall) -> Moments | None:
        one, other = call.operand("self"), call.operand("other")
        if one is None or other is None or other.std:
            return None
        if factor is None:
            return one.scaled(1.0, sign * float(call.given.get("alpha", 1)) * other.mean)
        return one.scaled(factor(other.mean)) if other.mean else None

    return rule


def _joined(call: _InitCall) -> Moments | None:
    refs = call.given["tensors"]
    parts = [(one, call.expectations.operand(call.op, one)) for one in refs]
    known = [(float(_elements(one)), value) for one, value in parts if value is not None]
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
    **dict.fromkeys(("neg", "neg_"), lambda call: one.scaled(-1.0) if (one := call.operand("self")) else None),
    **dict.fromkeys(("cat", "stack"), _joined),
}
