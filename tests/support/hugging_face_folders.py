"""Whether a folder that transformers has saved gives a recorded model what ``from_pretrained`` gives it, bit for bit.

Each class is built eagerly, its weights are set to values that no init makes, and it is saved. Compared are all
parameters and buffers, those that are not saved too: names, dtypes, shapes, values, and which share memory. Where
``from_pretrained`` fails, or gives other values than were saved, the eager model itself decides. It also decides about
``requires_grad``, which ``from_pretrained`` does not keep.

A class with a body (``base_model_prefix``) is also filled from a folder of the body alone, with its head initialized
afresh, and the body from the folder of the whole.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fabric_init import Fabric, FabricInitError, deferred_init, materialize
from fabric_init.checkpoints import Part, open_checkpoint
from tests.support.architectures import model_classes
from tests.support.identity import same_bits
from tests.support.worker import at_most, brief, buildable

EQUAL = "equal"
EQUAL_TO_EAGER = "equal to what was saved, which from_pretrained's is not"
REFUSED = "refused"
NOT_IN_FOLDER = "refused, because the folder lacks what from_pretrained initializes afresh"
DIFFERENT = "silently different"
NOT_SAVED = "transformers cannot save it"
NOT_RELOADED = "transformers cannot load it; ours is equal to what was saved"
NOT_RELOADED_REFUSED = "transformers cannot load it, and ours refuses"
NO_ANSWER = "no answer"
CRASHED = "ends in an error that is not ours"
REFUSALS = (REFUSED, NOT_IN_FOLDER, NOT_RELOADED_REFUSED)
WRONG = (DIFFERENT, NO_ANSWER, CRASHED)

LOAD, FABRIC, BODY_TO_WHOLE, WHOLE_TO_BODY = "load", "fabric", "body to whole", "whole to body"
LOADS = {
    LOAD: "its own folder, by materialize",
    FABRIC: "its own folder, by init_module",
    BODY_TO_WHOLE: "a whole model from its body's folder, the head initialized afresh",
    WHOLE_TO_BODY: "a body from the whole model's folder",
}

_TEMPORARY = re.compile(rf"{re.escape(tempfile.gettempdir())}/[^/]+/")
_SECONDS = 240
_LINES = 12
VALUES_DIFFER = "values differ"


@dataclass
class Row:
    """What came of one load.

    Attributes:
        outcome: one of the constants above.
        reason: of a refusal the error, of a difference the first one; of transformers, what it says or does.
        lines: more of it.
        way: what had to be said beside ``reinit=``; empty if nothing.
        frozen: whether the model keeps ``requires_grad`` of its constructor where ``from_pretrained`` does not.
    """

    outcome: str
    reason: str = ""
    lines: list[str] = field(default_factory=list)
    way: str = ""
    frozen: bool = False


class Loaded(NamedTuple):
    """What ``from_pretrained`` made of a folder.

    Attributes:
        model: ``None`` if it raised.
        why: what it raised, or what was not as saved.
        fresh: the names of tensors to which it gave values that were not saved.
        ignored: the keys of the folder that it had no use for.
    """

    model: nn.Module | None
    why: str
    fresh: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, under every name that it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def saved_names(model: nn.Module) -> set[str]:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        names |= {dot + name for name in module._buffers if name not in module._non_persistent_buffers_set}
    return names


def perturb(model: nn.Module) -> None:
    """Give every floating-point tensor that is saved, and every count, values that no init makes."""
    generator = torch.Generator().manual_seed(1)
    saved = saved_names(model)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if name in saved and tensor.is_floating_point():
                value = torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01
                tensor.copy_(value.to(tensor.dtype))
            elif name in saved and tensor.dtype == torch.int64 and tensor.ndim == 0:
                tensor.fill_(7)


def _ties(tensors: dict[str, Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            groups.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def _unequal(one: Tensor | None, other: Tensor | None) -> str:
    if one is None or other is None:
        return "there is none" if one is None else "missing"
    for what in ("dtype", "shape", "device"):
        if getattr(one, what) != getattr(other, what):
            return f"{what} {getattr(one, what)} != {getattr(other, what)}"
    return "" if one.is_meta or same_bits(one, other) else VALUES_DIFFER


def differences(expected: nn.Module, got: nn.Module, besides: Collection[str] = ()) -> dict[str, str]:
    """What is not the same, by name; for ties, under ``"ties"``. Values of ``besides`` may differ."""
    left, right = tensors_of(expected), tensors_of(got)
    found = {
        name: why
        for name in dict.fromkeys([*left, *right])
        if (why := _unequal(left.get(name), right.get(name))) and not (name in besides and why == VALUES_DIFFER)
    }
    if not found and _ties(left) != _ties(right):
        found["ties"] = f"{sorted(map(sorted, _ties(left)))} != {sorted(map(sorted, _ties(right)))}"
    return found


def unlike_grads(expected: nn.Module, got: nn.Module) -> dict[str, str]:
    """Whose ``requires_grad`` differs."""
    right = tensors_of(got)
    return {
        name: f"requires_grad {tensor.requires_grad} != {right[name].requires_grad}"
        for name, tensor in tensors_of(expected).items()
        if name in right and tensor.requires_grad != right[name].requires_grad
    }


def from_pretrained(model_class: Any, folder: Path, eager: nn.Module, config: Any = None) -> Loaded:
    """Let transformers load. ``eager`` has the values that were saved, for names that it has."""
    torch.manual_seed(0)
    try:
        model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True)
    except Exception as error:  # whatever it is, it is transformers' own
        return Loaded(None, _TEMPORARY.sub("", brief(error)))
    before, after = tensors_of(eager), tensors_of(model)
    saved = saved_names(model)
    lost = {name for name in before.keys() & after.keys() if _unequal(before[name], after[name]) == VALUES_DIFFER}
    fresh = {*info["missing_keys"], *(name for name in lost if name in saved)} & after.keys()
    why = ""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            why += f"{what} {sorted(map(str, info[what]))[:3]} "
    if fresh - set(info["missing_keys"]):
        why += f"other values than saved, without a word: {sorted(fresh - set(info['missing_keys']))[:3]} "
    if lost - saved:
        why += f"other values than the constructor's: {sorted(lost - saved)[:3]}"
    return Loaded(model, why.strip(), frozenset(fresh), frozenset(info["unexpected_keys"]))


def compare(load: Callable[[], nn.Module], loaded: Loaded, eager: nn.Module, *, fresh: bool = False) -> Row:
    """What comes of ``load``, against ``from_pretrained``. ``fresh``: new values are asked for where it makes them."""
    torch.manual_seed(0)
    try:
        model = load()
    except Exception as error:
        message = _TEMPORARY.sub("", str(error))
        lines = [line.strip() for line in message.splitlines()][:_LINES]
        reason = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
        if not isinstance(error, FabricInitError):
            return Row(CRASHED, reason, lines)
        if loaded.model is None:
            return Row(NOT_RELOADED_REFUSED, f"{loaded.why} / {reason}", lines)
        if loaded.fresh and not fresh:
            return Row(NOT_IN_FOLDER, loaded.why, [reason, *lines])
        return Row(REFUSED, reason, lines)
    besides = loaded.fresh if fresh else ()
    if loaded.model is None:
        wrong = differences(eager, model) or unlike_grads(eager, model)
        if not wrong:
            return Row(NOT_RELOADED, loaded.why)
        return Row(DIFFERENT, *_said(wrong))
    thawed, grads = unlike_grads(loaded.model, model), unlike_grads(eager, model)
    if fresh:  # a whole model may freeze its body, and not do so to one that is built alone
        grads = {name: why for name, why in grads.items() if name in thawed}
    wrong = differences(loaded.model, model, besides) or grads
    if not wrong:
        return Row(EQUAL, frozen=bool(thawed))
    from_eager = differences(eager, model, besides) | grads
    if not wrong.keys() & from_eager.keys():
        return Row(EQUAL_TO_EAGER, loaded.why or _said(wrong)[0], _said(wrong)[1])
    return Row(DIFFERENT, *_said(wrong))


def _said(wrong: dict[str, str]) -> tuple[str, list[str]]:
    lines = [f"{name}: {why}" for name, why in wrong.items()]
    return lines[0], [f"{len(lines)} differences", *lines[:_LINES]]


def recorded(model_class: Any, config: Any, folder: Path, **options: Any) -> nn.Module:
    with deferred_init():
        model: nn.Module = model_class(config)
    materialize(model, checkpoint=folder, **options)
    return model


def in_the_block(model_class: Any, config: Any, folder: Path) -> nn.Module:
    with Fabric(accelerator="cpu", devices=1).init_module(checkpoint=folder):
        model: nn.Module = model_class(config)
    return model


class Saved(NamedTuple):
    """A folder, and a maker of the config to build from; ``given`` if the folder has no config that can be read."""

    folder: Path
    config: Callable[[], Any]
    given: bool


def save(model: Any, folder: Path) -> Saved:
    """Save it. A config that is tiny beyond what its own checks allow stays out of the folder and is handed on."""
    from transformers import PretrainedConfig

    kind = type(model.config)
    try:
        model.save_pretrained(folder)
        kind.from_pretrained(folder)
    except Exception:
        with patch.object(PretrainedConfig, "save_pretrained", lambda *_, **__: None):
            model.save_pretrained(folder)
        generation = folder / "generation_config.json"
        if not generation.exists():  # else it is looked for in the config's file
            generation.write_text("{}")
        return Saved(folder, lambda: copy.deepcopy(model.config), True)
    return Saved(folder, lambda: kind.from_pretrained(folder), False)


def _without(keys: Collection[str]) -> Callable[[str], str | None]:
    return lambda key: None if key in keys else key


def _first_that_loads(
    model_class: Any, saved: Saved, config: Callable[[], Any], original: nn.Module, part: Part
) -> Row:
    """By itself if that will do, or with ``rename=``: a prefix, and not the keys that transformers ignores."""
    loaded = from_pretrained(model_class, saved.folder, original, config())
    options: dict[str, Any] = {"reinit": sorted(loaded.fresh)} if loaded.fresh else {}
    ways: dict[str, dict[str, Any]] = {"": {}, f"rename={part}": {"rename": part}}
    if loaded.ignored:
        ways["rename= that drops what from_pretrained ignores"] = {"rename": _without(loaded.ignored)}
        ways[f"the same, and {part}"] = {"rename": [_without(loaded.ignored), part]}
        ways["strict=False"] = {"strict": False}
    for way, more in ways.items():
        row = compare(
            lambda more=more: recorded(model_class, config(), saved.folder, **more, **options),  # type: ignore[misc]
            loaded,
            original,
            fresh=True,
        )
        row.way = way
        if row.outcome not in REFUSALS:
            break
    return row


def _parts(model_class: Any, eager: Any, saved: Saved, body_folder: Path) -> dict[str, Row]:
    from transformers import PreTrainedModel

    prefix = model_class.base_model_prefix
    body = getattr(eager, prefix, None) if prefix else None
    if not isinstance(body, PreTrainedModel) or type(body) is model_class:
        return {}
    try:
        saved_body = save(body, body_folder)
    except Exception as error:
        return {BODY_TO_WHOLE: Row(NOT_SAVED, brief(error))}
    return {
        BODY_TO_WHOLE: _first_that_loads(model_class, saved_body, saved.config, eager, Part("", into=f"{prefix}.")),
        WHOLE_TO_BODY: _first_that_loads(type(body), saved, saved_body.config, body, Part(f"{prefix}.")),
    }


def conversions_used(model: Any, keys: Collection[str]) -> list[str]:
    """The kinds of conversions by which transformers turns these keys of a folder into names of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        conversions = get_model_conversion_mapping(model)
        used = set()
        for key in keys:
            for one in conversions:
                renamed, pattern = one.rename_source_key(key)
                if pattern is not None or renamed != key:
                    operations = (type(operation).__name__ for operation in getattr(one, "operations", ()))
                    used.add(" + ".join([type(one).__name__, *operations]))
                key = renamed
    except Exception as error:  # only a hint for whoever reads the table
        return [brief(error)]
    return sorted(used)


def _one(model_class: Any, make: Callable[[], Any], with_fabric: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    eager = model_class(make())
    perturb(eager)
    answer: dict[str, Any] = {"tensors": len(tensors_of(eager)), "conversions": [], "config": "read"}
    with tempfile.TemporaryDirectory() as top:
        try:
            saved = save(eager, Path(top) / "whole")
        except Exception as error:
            return {**answer, LOAD: asdict(Row(NOT_SAVED, brief(error)))}
        answer["conversions"] = conversions_used(eager, open_checkpoint(saved.folder).keys())
        answer["config"] = "given" if saved.given else "read"
        loaded = from_pretrained(model_class, saved.folder, eager, saved.config() if saved.given else None)
        rows = {LOAD: compare(lambda: recorded(model_class, saved.config(), saved.folder), loaded, eager)}
        if with_fabric:
            rows[FABRIC] = compare(lambda: in_the_block(model_class, saved.config(), saved.folder), loaded, eager)
        rows |= _parts(model_class, eager, saved, Path(top) / "body")
        return {**answer, **{name: asdict(row) for name, row in rows.items()}}


def run(job: str) -> dict[str, Any]:
    """Compare all classes of an architecture, or those named after it, these with Fabric too."""
    architecture, *chosen = job.split()
    answer: dict[str, Any] = {"architecture": job, "models": [], "not_built": {}}
    try:
        classes = model_classes(architecture)
    except Exception as error:
        return {**answer, "not_built": {architecture: brief(error)}}
    for model_class in classes:
        name = model_class.__name__
        if chosen and name not in chosen:
            continue
        make, why = buildable(model_class)
        if make is None:
            answer["not_built"][name] = why
            continue
        try:
            with at_most(_SECONDS):
                found = _one(model_class, make, bool(chosen))
        except Exception as error:
            found = {"tensors": 0, "conversions": [], LOAD: asdict(Row(NO_ANSWER, brief(error)))}
        if not found["tensors"] and found[LOAD]["outcome"] != NO_ANSWER:
            answer["not_built"][name] = "nothing to compare: no tensors"
            continue
        answer["models"].append({"name": name, **found})
    return answer


def answered(answer: dict[str, Any]) -> dict[str, Any]:
    """The same, in the form of this file where the process that should answer died or hung."""
    for model in answer["models"]:
        if LOAD not in model:
            model.update({"conversions": [], LOAD: asdict(Row(NO_ANSWER, *model["differences"]))})
    return answer
