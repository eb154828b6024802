"""The logger ``fabric_init`` and its channels, which the environment variable ``FABRIC_INIT_LOG`` turns on.

Each channel is an ordinary logger of the standard library, a child of ``fabric_init``: an application that configures
logging itself needs nothing of this module. ``FABRIC_INIT_LOG=record,fill`` is for a look without touching any code.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import torch.distributed as dist

VARIABLE = "FABRIC_INIT_LOG"
CHANNELS = {
    "record": "recorded blocks: when each opened and closed, how many ops it recorded, and how long it took",
    "plan": "what was decided for the tensors of a model, and which checkpoint is read",
    "fill": "what each tensor got, from where, how many bytes, and how long it took",
}
"""The name of each channel, and what it reports."""

root = logging.getLogger("fabric_init")
root.addHandler(logging.NullHandler())  # a library that nobody asked to log stays silent


def channel(name: str) -> logging.Logger:
    """Return the logger ``fabric_init.<name>`` of one of the ``CHANNELS``."""
    assert name in CHANNELS
    return root.getChild(name)


class RankFormatter(logging.Formatter):
    """Names the logger, and the rank where there are several: their lines arrive on one terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return f"[rank {dist.get_rank()}] {text}" if several else text


def channels_in(value: str) -> Iterator[str]:
    """Yield the channels that ``value`` names, separated by commas; ``all`` stands for every one of them.

    An unknown name is a warning that lists the known ones: a typing error in a variable should stop no training.
    """
    for name in filter(None, (part.strip().lower() for part in value.split(","))):
        if name == "all":
            yield from CHANNELS
        elif name in CHANNELS:
            yield name
        else:
            warnings.warn(
                f"{VARIABLE}={value}: there is no channel {name!r}. Known channels: {', '.join(CHANNELS)}, all.",
                stacklevel=2,
            )


def turn_on(value: str) -> None:
    """Write the channels that ``value`` names to stderr, down to level ``DEBUG``."""
    names = list(channels_in(value))
    if not names:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(RankFormatter("%(name)s: %(message)s"))
    root.addHandler(handler)
    root.propagate = False  # otherwise an application with a handler of its own shows each line twice
    for name in names:
        channel(name).setLevel(logging.DEBUG)


turn_on(os.environ.get(VARIABLE, ""))
