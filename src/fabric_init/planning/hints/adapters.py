"""Suggest arguments for a model with adapters (LoRA) and a checkpoint of the model without them.

peft puts ``base_layer`` (or ``original_module``) between a layer's name and its tensors', its own tensors beside that,
and ``base_model.model.`` before all names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from fabric_init._text import quoted

_Shapes = Mapping[str, torch.Size]
_WRAPPED = re.compile(r"(?P<layer>.+)\.(?P<inside>base_layer|original_module)\.(?P<tensor>[^.]+)")


class Adapters(NamedTuple):
    """Arguments that load the model inside and initialize the adapters; ``str()`` returns a sentence with them."""

    rules: tuple[tuple[str, str], ...]
    """Regexes and their replacements."""
    globs: tuple[str, ...]
    """Of the adapters' tensors."""
    exact: bool
    """Whether a tensor takes every key."""
    loaded: int
    initialized: int

    @property
    def reinit(self) -> tuple[str, ...]:
        """The globs, if they are needed: with keys to ignore there is ``strict=False`` for both."""
        return self.globs if self.exact else ()

    def __str__(self) -> str:
        mapping = ", ".join(f"{quoted(old)}: {quoted(new)}" for old, new in self.rules)
        rest = f"reinit=[{', '.join(map(quoted, self.globs))}]" if self.exact else "strict=False"
        return (
            f"rename={{{mapping}}}, {rest} would load {self.loaded} tensors and initialize the adapters' "
            f"{self.initialized}"
        )


def likely_adapters(missing: _Shapes, unexpected: _Shapes, names: Collection[str]) -> Adapters | None:
    """Return arguments that load the model inside and initialize the adapters; ``None`` for none.

    Args:
        missing: tensors of the model that no key is for.
        unexpected: checkpoint keys, renamed as the user asked, that no tensor is for.
        names: every name of every tensor in the model, in its order.
    """
    wrapped = [match for match in map(_WRAPPED.fullmatch, names) if match is not None]
    before = _prefix(wrapped, missing, unexpected)
    if before is None:
        return None
    rules = [*_rules(wrapped, before, unexpected), *([("^", before)] if before else [])]
    renamed = {_renamed(key, rules): shape for key, shape in unexpected.items()}
    adapters = [name for name in missing if renamed.get(name) != missing[name]]
    globs = _globs(adapters, {match["layer"] for match in wrapped})
    loaded = len(missing) - len(adapters)
    if not loaded or globs is None or any(fnmatchcase(name, glob) for name in renamed for glob in globs):
        return None
    return Adapters(tuple(rules), tuple(globs), renamed.keys() <= set(names), loaded, len(adapters))


def _prefix(wrapped: Iterable[re.Match[str]], missing: _Shapes, unexpected: _Shapes) -> str | None:
    """Return the prefix of the names of the model inside."""
    votes: Counter[str] = Counter()
    for match in wrapped:
        parts = f"{match['layer']}.{match['tensor']}".split(".")
        for start in range(len(parts) - 1):
            if match.string in missing and unexpected.get(".".join(parts[start:])) == missing[match.string]:
                votes["".join(f"{part}." for part in parts[:start])] += 1
                break
    return votes.most_common(1)[0][0] if votes else None


def _rules(wrapped: Iterable[re.Match[str]], before: str, unexpected: _Shapes) -> list[tuple[str, str]]:
    """Return the regexes and replacements that insert the wrapper's name into keys of wrapped layers, and no others."""
    layers: dict[str, dict[str, None]] = {}
    for match in wrapped:
        layers.setdefault(match["inside"], {})[match["layer"].removeprefix(before)] = None
    rules = []
    for inside, of_it in layers.items():
        short = dict.fromkeys(layer.rpartition(".")[2] for layer in of_it)
        pattern = rf"(^|\.)({_any_of(short)})\.(\w+)$"
        caught = {key.rpartition(".")[0] for key in unexpected if re.search(pattern, key)}
        if caught <= of_it.keys():
            rules.append((pattern, rf"\1\2.{inside}.\3"))
        else:  # layers of the same name elsewhere are not wrapped
            rules.append((rf"^({_any_of(of_it)})\.(\w+)$", rf"\1.{inside}.\2"))
    return rules


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


def _renamed(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _globs(adapters: Iterable[str], layers: Collection[str]) -> list[str] | None:
    """Return globs for the adapters' tensors, by what follows a layer's name; ``None`` if some are of other layers."""
    globs: dict[str, None] = {}
    for name in adapters:
        parts = name.split(".")
        after = next((at for at in range(1, len(parts)) if ".".join(parts[:at]) in layers), None)
        if after is None:
            return None
        kind, underscore, _ = parts[after].partition("_")
        globs[f"*.{kind}{underscore}*"] = None
    return list(globs)
