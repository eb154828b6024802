"""Words for messages and reports: counts, sizes, shapes and lists of names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MOST_LINES = 20


def counted(number: int, noun: str) -> str:
    """Return ``1 tensor``, ``2,000 tensors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def joined(names: Sequence[str], most: int = 8) -> str:
    """Return ``a, b, c``; of more than ``most`` names the first ones, and how many more there are."""
    return ", ".join(names[:most]) + (f" … and {len(names) - most:,} more" if len(names) > most else "")


def listed(names: Sequence[str], most: int | None = _MOST_LINES) -> str:
    """Return ``names`` in indented lines; of more than ``most`` the first ones, and how many more there are."""
    lines = [f"  {name}" for name in names[:most]]
    if most is not None and len(names) > most:
        lines.append(f"  … and {len(names) - most:,} more")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Return ``text`` as a Python string literal, raw if it has backslashes."""
    if '"' in text:
        return repr(text)
    return f'r"{text}"' if "\\" in text else f'"{text}"'


def human_bytes(nbytes: int) -> str:
    """Return ``10 bytes``, ``4.2 kB``, ``13.5 GB``, in powers of 1,000."""
    if nbytes < 1000:
        return counted(nbytes, "byte")
    size = nbytes / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def shape_text(shape: Sequence[int]) -> str:
    """Return ``4096×11008``; ``scalar`` for a tensor without dimensions."""
    return "×".join(map(str, shape)) or "scalar"


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
