"""Whether a recorded and materialized model is, bit for bit, the model that plain PyTorch builds from the same seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init import deferred_init
from fabric_init.api import materialize
from fabric_init.errors import UninitializedTensorError

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` leaves NaN, or the largest integer, wherever nothing is written afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def poison(tensor: Tensor) -> Tensor:
    """The elements that hold what :func:`poisoned_memory` leaves."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return torch.zeros(1, dtype=torch.bool)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.detach().isnan()
    if tensor.dtype == torch.bool:
        return tensor.clone()
    return tensor == torch.iinfo(tensor.dtype).max


def _tensors_in(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif depth < 4 and isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}[{key!r}]", depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{index}]", depth + 1)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, buffer and plain tensor attribute, under every name that it has."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[dot + name] = tensor
        for name, value in vars(module).items():
            if name not in _MODULE_INTERNALS:
                found.update(_tensors_in(value, dot + name))
    return found


def _plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 4 and all(_plain(item, depth + 1) for item in value)
    return isinstance(value, _PLAIN)


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"  # parametrizations make a new class for every module


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model but its tensors' values: module types, flags, names, plain attributes."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        found[prefix] = {
            "type": _type_name(type(module)),
            "training": module.training,
            "parameters": [(name, value is None) for name, value in module._parameters.items()],
            "buffers": [(name, value is None) for name, value in module._buffers.items()],
            "not persistent": sorted(module._non_persistent_buffers_set),
            "children": [(name, value is None) for name, value in module._modules.items()],
            "attributes": {
                name: repr(value)
                for name, value in vars(module).items()
                if name not in _MODULE_INTERNALS and _plain(value)
            },
        }
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_quantized:
        return torch.equal(one, other)
    one, other = one.to_dense(), other.to_dense()
    one, other = one.detach().resolve_conj().resolve_neg(), other.detach().resolve_conj().resolve_neg()
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    # contiguous copies have the same bytes exactly where every bit of every element agrees, NaN and -0.0 too
    one_bytes = one.contiguous().clone().untyped_storage()
    other_bytes = other.contiguous().clone().untyped_storage()
    return torch.equal(
        torch.empty(0, dtype=torch.uint8).set_(one_bytes), torch.empty(0, dtype=torch.uint8).set_(other_bytes)
    )


def _properties(tensor: Tensor) -> dict[str, Any]:
    return {
        "type": type(tensor),
        "shape": tuple(tensor.shape),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "layout": tensor.layout,
        # meta kernels of torch disagree with its CPU kernels about dimensions of size 1, where a stride means nothing
        "stride": [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
        if tensor.layout == torch.strided and tensor.numel()
        else None,
        "requires_grad": tensor.requires_grad,
        "is_leaf": tensor.is_leaf,
        "attributes": sorted(vars(tensor)) if hasattr(tensor, "__dict__") else [],
    }


def _ties(tensors: dict[str, Tensor], key: Callable[[Tensor], int]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.layout == torch.strided:
            groups.setdefault(key(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def differences(eager: nn.Module, filled: nn.Module, ignore_values_of: frozenset[str] = frozenset()) -> list[str]:
    """What is not the same, one line each. ``ignore_values_of``: tensors that plain PyTorch leaves as garbage."""
    found: list[str] = []
    left, right = structure_of(eager), structure_of(filled)
    if list(left) != list(right):
        found.append(f"modules: {list(left)} != {list(right)}")
    for name in left.keys() & right.keys():
        found += [
            f"module {name!r}, {what}: {left[name][what]} != {right[name][what]}"
            for what in left[name]
            if left[name][what] != right[name][what]
        ]
    expected, got = tensors_of(eager), tensors_of(filled)
    if list(expected) != list(got):
        found.append(f"tensor names: {sorted(set(expected) ^ set(got)) or 'order'}")
    for name in expected.keys() & got.keys():
        one, other = expected[name], got[name]
        before, after = _properties(one), _properties(other)
        if not one.is_leaf:  # computed from parameters: it comes back with its values, but without its graph
            after |= {"requires_grad": one.requires_grad, "is_leaf": False}
        wrong = [f"{name}: {what} {before[what]} != {after[what]}" for what in before if before[what] != after[what]]
        if not wrong and not other.is_meta and name not in ignore_values_of and not same_bits(one, other):
            wrong = [f"{name}: values differ"]
        found += wrong
    for what, key in (("same object", id), ("same memory", lambda tensor: tensor.untyped_storage().data_ptr())):
        ties = _ties(expected, key), _ties(got, key)  # type: ignore[arg-type]
        if ties[0] != ties[1]:
            found.append(
                f"{what}: {sorted(map(sorted, ties[0] - ties[1]))} != {sorted(map(sorted, ties[1] - ties[0]))}"
            )
    return found


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter and persistent buffer once: the tensors that must have a value."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        saved = {
            name: tensor for name, tensor in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, tensor in (*module._parameters.items(), *saved.items()):
            if tensor is not None:
                found.setdefault(id(tensor), (dot + name, tensor))
    return dict(found.values())


@dataclass
class Verdict:
    """What :func:`compare` found."""

    differences: list[str] = field(default_factory=list)
    tensors: int = 0
    never_written: list[str] = field(default_factory=list)


_COUNT = re.compile(r"never gives (\d+) tensors? a value")


def compare(build: Callable[[], nn.Module], seed: int = 0) -> Verdict:
    """Build eagerly, and recorded with ``rng="eager"`` from the same seed, materialize, and compare everything.

    Where the constructor leaves a parameter or persistent buffer unwritten, plain PyTorch leaves garbage and
    ``materialize`` refuses: then exactly the tensors that hold poison must be named, and the model must fill once
    a checkpoint brings these.
    """
    with poisoned_memory():
        torch.manual_seed(seed)
        eager = build()
        torch.manual_seed(seed)
        with deferred_init(rng="eager"):
            recorded = build()
        garbage = {name: tensor for name, tensor in first_names(eager).items() if bool(poison(tensor).any())}
        verdict = Verdict(tensors=len(tensors_of(eager)), never_written=sorted(garbage))
        try:
            report = materialize(recorded)
        except UninitializedTensorError as error:
            message = str(error)
            verdict.differences += _garbage_differences(message, garbage)
            if verdict.differences:
                return verdict
            with TemporaryDirectory() as folder:
                path = Path(folder) / "rest.pt"
                torch.save({name: torch.zeros_like(tensor).detach() for name, tensor in garbage.items()}, path)
                report = materialize(recorded, checkpoint=path, strict=False)
        else:
            # integers that are as large as can be are not poison unless materialize says so
            silent = [name for name, tensor in garbage.items() if tensor.is_floating_point() or tensor.is_complex()]
            if silent:
                again = _with_other_poison(build, seed, silent)
                verdict.differences += [f"{name}: garbage in eager code, and no error" for name in again]
            verdict.never_written = []
            garbage = {}
        scratch = {row.name for row in report.rows if row.status == "scratch"}
        everything = tensors_of(eager)
        aliases = {
            name
            for name, tensor in everything.items()
            if any(tensor is value for value in garbage.values()) or name in scratch
        }
        for name in scratch:
            if not bool(poison(everything[name]).any()):
                verdict.differences.append(f"{name}: the report says scratch, but eager code wrote all of it")
        verdict.differences += differences(eager, recorded, frozenset(aliases))
    return verdict


def _garbage_differences(message: str, garbage: dict[str, Tensor]) -> list[str]:
    found = []
    count = _COUNT.search(message)
    named = {line.strip() for line in message.splitlines() if line.startswith("  ") and "… and" not in line}
    if count is None or int(count[1]) != len(garbage):
        found.append(f"UninitializedTensorError counts {count and count[1]}, eager leaves {sorted(garbage)}: {message}")
    if not named <= garbage.keys() or (len(garbage) <= len(named) and named != garbage.keys()):
        found.append(f"UninitializedTensorError names {sorted(named)}, eager leaves {sorted(garbage)}")
    return found


def _with_other_poison(build: Callable[[], nn.Module], seed: int, names: list[str]) -> list[str]:
    """Which of ``names`` really are garbage: not NaN when fresh memory is not."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(seed)
    plain = tensors_of(build())
    return [name for name in names if not bool(plain[name].isnan().any())]
