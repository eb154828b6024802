"""What ``strict=False`` must not hide: tensors that the checkpoint seems to hold in another way."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

import torch

from fabric_init._text import counted, joined, listed
from fabric_init.checkpoints import CheckpointReader
from fabric_init.planning.hints.name_similarity import means_another, related
from fabric_init.planning.hints.proposals import Proposals, fitting, numbering_of, proposals
from fabric_init.planning.matching import Matching
from fabric_init.planning.plan import Action, PlanEntry

_IGNORED = frozenset(
    (
        "inv_freq",
        "position_ids",
        "token_type_ids",
        "num_batches_tracked",
        "running_mean",
        "running_var",
        "masked_bias",
    )
)
"""Last parts of keys that checkpoints hold and models do without; only a tensor of the same name can be meant."""
_FEW = 2
_MOST_GLOBS = 6


def hidden_mistake(matching: Matching, reader: CheckpointReader) -> str | None:
    """Return the message of an error if tensors that are missing seem to be among the keys that nobody takes."""
    found = proposals(matching, reader)
    left_over = None if found.likely or found.ambiguous else _left_over(matching, reader)
    if not found.likely and not found.ambiguous and left_over is None:
        return None
    names, keys = _concerned(found, left_over, matching)
    head = f"{reader.path}: strict=False would give {counted(len(names), 'tensor')} new values, "
    if found.likely:
        lines = [head + "but the checkpoint seems to have them under other names:", *found.lines()]
    elif found.ambiguous:
        lines = [head + "and the checkpoint has keys that may be meant for them:", *found.lines()]
    else:
        lines = [
            head + "and the checkpoint has as much that no tensor takes, in the same modules:",
            "Say with convert= or rename= how the one becomes the other.",
        ]
    lines.append(_insistence(names, keys, matching))
    lines += [f"Missing ({len(names)}):", listed(names), f"Not in the model ({len(keys)}):", listed(keys)]
    return "\n".join(lines)


def in_part(entries: Iterable[PlanEntry], missing: Iterable[str]) -> list[str]:
    """Return, in words, the modules of which some tensors are loaded and some are missing.

    Besides those of one module, these are the numbered modules of one list (layers, experts) that lack all of theirs.
    """
    absent = set(missing)
    if not absent:
        return []
    loaded: defaultdict[str, list[str]] = defaultdict(list)
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    with_loads: set[str] = set()
    without: dict[str, None] = {}
    for entry in entries:
        name = entry.slot.name
        module, _, leaf = name.rpartition(".")
        if entry.action is Action.LOAD:
            loaded[module].append(leaf)
            with_loads.update(_above(name))
        elif absent.intersection(entry.slot.names) and not leaf.startswith("lora_"):
            lacking[module].append(leaf)
            without.update(dict.fromkeys(_above(name)))
    texts = [
        f"{module or 'the model'}: {joined(loaded[module])}, but not {joined(leaves)}"
        for module, leaves in lacking.items()
        if module in loaded
    ]
    lists: defaultdict[str, list[str]] = defaultdict(list)
    for module in without:
        parent, _, number = module.rpartition(".")
        if number.isdecimal() and module not in with_loads:
            lists[parent].append(number)
    siblings = {module.rpartition(".")[0] for module in with_loads if module.rpartition(".")[2].isdecimal()}
    texts += [
        f"{parent or 'the model'}: others of it, but nothing of {joined(numbers)}"
        for parent, numbers in lists.items()
        if parent in siblings
    ]
    return _once_for_all_layers(texts)


def _once_for_all_layers(texts: Iterable[str]) -> list[str]:
    """Return one text for those that differ in the numbers of their modules only."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for text in texts:
        module, colon, rest = text.partition(":")
        alike[re.sub(r"(?<![^.])\d+(?![^.])", "{}", module) + colon + rest].append(text)
    return [same[0] if len(same) == 1 else f"{text} ({len(same)} times)" for text, same in alike.items()]


def _left_over(matching: Matching, reader: CheckpointReader) -> tuple[list[str], list[str]] | None:
    """Return missing tensors and keys in the same modules which seem to be the same values, cut in another way.

    Layers that only the model or only the checkpoint has are left out.
    """
    numbering = numbering_of(matching)
    missing = {slot.name: slot.shape for slot in matching.missing if not numbering.new(slot.name)}
    leaves = {name.rpartition(".")[2] for name in missing}
    offered: dict[str, torch.Size] = {}
    key_of: dict[str, str] = {}
    for key in matching.unexpected:
        name = matching.names[key]
        leaf = name.rpartition(".")[2]
        if key not in reader.extra_state and (leaf in leaves or leaf not in _IGNORED) and not numbering.dropped(name):
            offered[name], key_of[name] = reader.spec(key).shape, key
    wanted, there = _by_module(missing), _by_module(offered)
    names: dict[str, None] = {}
    keys: dict[str, None] = {}
    for module in wanted.keys() & there.keys():
        ours, theirs = wanted[module], there[module]
        if all(means_another(key, name) for name in ours[:8] for key in theirs[:8]):
            continue
        if _as_many(ours, missing, theirs, offered):
            names.update(dict.fromkeys(ours))
            keys.update(dict.fromkeys(key_of[key] for key in theirs))
    if not names:
        return None
    return [name for name in missing if name in names], [key for key in matching.unexpected if key in keys]


def _as_many(
    ours: Sequence[str], missing: Mapping[str, torch.Size], theirs: Sequence[str], offered: Mapping[str, torch.Size]
) -> bool:
    """Return whether keys are as many elements as tensors, or of the shapes of three or more.

    One or two tensors for as many keys need names that are related, too.
    """
    as_many = sum(missing[name].numel() for name in ours) == sum(offered[key].numel() for key in theirs) > 0
    if as_many and len(ours) == len(theirs) <= _FEW:
        return any(related(key, name) for key in theirs for name in ours)
    return as_many or (
        len(ours) > _FEW and Counter(missing[name] for name in ours) <= Counter(offered[key] for key in theirs)
    )


def _by_module(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Return names by the modules that they are in, all of each, and those of one last part."""
    modules: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        for module in _above(name):
            modules[module, ""].append(name)
            modules[module, name.rpartition(".")[2]].append(name)
    return modules


def _above(name: str) -> Iterator[str]:
    """Yield the modules that a tensor is in, but for the model itself."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def _concerned(
    found: Proposals, left_over: tuple[list[str], list[str]] | None, matching: Matching
) -> tuple[list[str], list[str]]:
    if left_over is not None:
        return left_over
    named = [name for rivals in found.ambiguous for name in rivals.names]
    names = [slot.name for slot in matching.missing if slot.name in found.gained or slot.name in named]
    names += [name for name in matching.missing_extras if name in found.gained or name in named]
    return names, list(matching.unexpected)


def _insistence(names: Sequence[str], keys: Sequence[str], matching: Matching) -> str:
    """Return what to pass for new values all the same."""
    globs = ", ".join(f'"{glob}"' for glob in _globs(names, matching))
    starts = {key.partition(".")[0] + "." * ("." in key) for key in keys}
    drop = ""
    if len(starts) == 1 and not any(matching.names[key].startswith(tuple(starts)) for key in matching.taken):
        drop = f", or drop these keys: rename=lambda key: None if key.startswith({next(iter(starts))!r}) else key"
    return f"If the model's own init is meant: reinit=[{globs}]{drop}."


def _globs(names: Sequence[str], matching: Matching) -> list[str]:
    """Return globs for these tensors, and for no other that is loaded; every name of one that is tied."""
    chosen = set(names)
    fit = fitting(matching)
    slots = [entry.slot for entry in matching.entries]
    wanted = [name for slot in slots if slot.name in chosen for name in slot.names]
    others = [name for slot in slots if slot.name in fit or not slot.saved for name in slot.names]
    globs: dict[str, None] = {}
    for name in wanted:
        if any(fnmatchcase(name, glob) for glob in globs):
            continue
        for module in _above(name):
            if not any(fnmatchcase(other, f"{module}.*") for other in others):
                globs[f"{module}.*"] = None
                break
        else:
            globs[name] = None
    return list(globs) if len(globs) <= _MOST_GLOBS else [*list(globs)[:_MOST_GLOBS], "…"]
