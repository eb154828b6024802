"""Map checkpoint keys to tensor names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from fabric_init.checkpoints.mapping.select import Layers, Part
from fabric_init.errors import CheckpointMismatchError, OptionError

_OneRename = Mapping[str, str] | Callable[[str], str | None]
Rename = _OneRename | Sequence[_OneRename] | None

_WRONG_TYPE = "rename must be a mapping of regex to replacement or a callable, got {!r}"


def rename_keys(keys: Iterable[str], rename: Rename) -> dict[str, str]:
    """Return the tensor name for each checkpoint key, in the order of ``keys``.

    Args:
        keys: of the checkpoint.
        rename: a mapping of regex -> replacement (each applied with ``re.sub``, in order); or a callable that takes a
            key and returns the name, or ``None`` to drop the key; or a list of these, applied in order. ``None`` keeps
            every key.

    What a callable raises is passed on.

    Raises:
        OptionError: A regex or replacement is invalid, or a callable returned something other than a name or ``None``.
        CheckpointMismatchError: A part or layer is not there, or two keys get the same name.
        TypeError: ``rename`` is neither a mapping, nor a callable, nor a list of these.
    """
    names = {key: key for key in keys}
    for rule in _as_list(rename):
        if isinstance(rule, (Part, Layers)):
            rule.check(names.values())
        apply = _as_function(rule)
        names = {key: new for key, name in names.items() if (new := _checked(name, apply(name))) is not None}
    taken: dict[str, str] = {}
    for key, name in names.items():
        if taken.setdefault(name, key) != key:
            raise CheckpointMismatchError(
                f"rename takes both {taken[name]!r} and {key!r} to {name!r}. Make the rename more specific, or drop "
                f"one of them: a callable that returns None drops a key."
            )
    return names


def _as_list(rename: Rename) -> Sequence[_OneRename]:
    if rename is None:
        return []
    text: object = rename
    if isinstance(text, str):  # a sequence, too
        raise TypeError(f"{_WRONG_TYPE.format(text)}; rename={{{'^' + re.escape(text)!r}: ''}} drops a prefix")
    return rename if isinstance(rename, Sequence) else [rename]


def _checked(key: str, name: object) -> str | None:
    if name is not None and not isinstance(name, str):
        raise OptionError(f"rename({key!r}) returned {name!r}, not a name (or None to drop the key).")
    return name


def _as_function(rename: _OneRename) -> Callable[[str], str | None]:
    if not isinstance(rename, Mapping):
        if not callable(rename):
            raise TypeError(_WRONG_TYPE.format(rename))
        return rename
    rules = [(_compiled(pattern, replacement), replacement) for pattern, replacement in rename.items()]

    def apply(key: str) -> str:
        for pattern, replacement in rules:
            key = pattern.sub(replacement, key)
        return key

    return apply


def _compiled(pattern: str, replacement: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")  # parses the replacement, whether it matches or not
    except (re.error, IndexError, TypeError) as error:
        # IndexError: a group name that the pattern lacks; TypeError: not strings.
        raise OptionError(
            f"rename={{{pattern!r}: {replacement!r}}} is not a valid regular expression with its replacement: {error}. "
            f"Escape literal dots and brackets; refer to groups as \\1."
        ) from error
    return compiled
