"""A look at shards under one index: what each of them holds, and where index and shards disagree."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from fabric_init._text import counted
from fabric_init.checkpoints.formats.indexed_files import check_shard, read_weight_map
from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import CheckpointError
from fabric_init.tools.inspect.contents import Damage
from fabric_init.tools.inspect.survey import Survey

Look = Callable[[AnyPath], Survey]
"""The survey of one shard. Raises :class:`~fabric_init.errors.CheckpointError` when nothing in it can be told."""

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")


def survey_index(index: AnyPath, look: Look) -> Survey:
    """Return what the index lists, compared with what its shards hold.

    Raises :class:`~fabric_init.errors.CheckpointError` when the index cannot be read.
    """
    survey = Survey("sharded", files={index.name: open_bytes(index, mmap=False).size})
    weight_map = read_weight_map(index)
    counts = Counter(weight_map.values())
    shards = {name: _look_at(index, name, number, look, survey) for name, number in counts.items()}
    held = {name: {one.key: one for one in shard.found} for name, shard in shards.items() if shard is not None}
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    for key, name in weight_map.items():
        if key in held.get(name, ()):
            survey.found.append(held[name][key])
        elif name in held:
            lacking[name].append(key)
    for name, keys in lacking.items():
        message = f"{counted(len(keys), 'tensor')} that the index says are in it are not"
        survey.damage.append(Damage("missing tensor", message, name, tuple(keys)))
    known = {one.key for one in survey.found}
    for name, tensors in held.items():
        if extra := tuple(key for key in tensors if weight_map.get(key) != name):
            message = f"{counted(len(extra), 'tensor')} in it that the index does not list there; no load brings them"
            survey.damage.append(Damage("not in the index", message, name, extra))
            survey.found += [tensors[key] for key in extra if key not in known]
            known.update(extra)
    _compare_numbers(index, set(counts), survey)
    kinds = sorted({shard.format for shard in shards.values() if shard is not None})
    survey.format = f"sharded {' and '.join(kinds) or index.name.removesuffix('.index.json').rpartition('.')[2]}"
    return survey


def _look_at(index: AnyPath, name: str, number: int, look: Look, survey: Survey) -> Survey | None:
    """One shard; what is wrong with it goes to ``survey``."""
    path = index.parent / name
    try:
        if isinstance(index, Path):
            check_shard(index, name, number)
        shard = look(path)
    except CheckpointError as error:
        there = path.is_file()
        keys = tuple(key for key, file in read_weight_map(index).items() if file == name)
        survey.files[name] = path.stat().st_size if there and isinstance(path, Path) else None
        message = str(error) if there else f"not there; the index says that it holds {counted(number, 'tensor')}"
        survey.damage.append(Damage("unreadable" if there else "missing file", message, name, keys))
        return None
    for one in shard.found:
        one.files = {name: one.nbytes}  # as the index has it, with its folder
    survey.files[name] = next(iter(shard.files.values()))
    survey.readable &= shard.readable
    survey.damage += shard.damage
    survey.ties += shard.ties
    survey.notes += [f"{name}: {note}" for note in shard.notes]
    return shard


def _compare_numbers(index: AnyPath, named: set[str], survey: Survey) -> None:
    """Names such as ``model-00001-of-00030.safetensors`` say how many there should be."""
    matches = [match for match in map(_NUMBERED.fullmatch, sorted(named)) if match is not None]
    for stem, total, suffix in sorted({(one["stem"], one["total"], one["suffix"]) for one in matches}):
        numbers = {int(one["number"]) for one in matches if (one["stem"], one["total"]) == (stem, total)}
        for number in sorted(set(range(1, int(total) + 1)) - numbers)[:1000]:
            name = f"{stem}-{number:05d}-of-{total}{suffix}"
            path = index.parent / name
            if path.is_file():
                survey.files[name] = open_bytes(path, mmap=False).size
                survey.damage.append(Damage("not in the index", "a shard that the index does not name", name))
            else:
                message = f"neither there nor in the index, which names {len(numbers)} of {int(total)}"
                survey.damage.append(Damage("missing file", message, name))


def survey_unindexed(folder: Path, names: list[str], look: Look) -> Survey:
    """Shards without their index: all that they hold, and the one thing that is wrong with them all."""
    survey = Survey("sharded")
    for name in names:
        try:
            shard = look(folder / name)
        except CheckpointError as error:
            survey.files[name] = (folder / name).stat().st_size
            survey.damage.append(Damage("unreadable", str(error), name))
            continue
        survey.found += shard.found
        survey.files |= shard.files
        survey.damage += shard.damage
        survey.format = f"sharded {shard.format}"
    match = _NUMBERED.fullmatch(names[0])
    assert match is not None
    message = "without this index no load knows which shards belong together"
    survey.damage.insert(0, Damage("missing file", message, f"{match['stem']}{match['suffix']}.index.json"))
    for number in range(1, min(int(match["total"]), 1000) + 1):
        name = f"{match['stem']}-{number:05d}-of-{match['total']}{match['suffix']}"
        if name not in names:
            survey.damage.append(Damage("missing file", f"of {int(match['total'])} shards this one is not there", name))
    return survey


def unindexed_shards(names: tuple[str, ...]) -> list[str]:
    """Return the shards among the files of a folder, if they are of one checkpoint and there is no index."""
    if any(name.endswith(".index.json") for name in names):
        return []
    matches = [match for match in map(_NUMBERED.fullmatch, names) if match is not None]
    sets = {(one["stem"], one["total"], one["suffix"]) for one in matches}
    return [one[0] for one in matches] if len(sets) == 1 else []
