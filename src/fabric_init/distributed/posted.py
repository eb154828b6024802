"""What each rank posts about its part of a model, for the others to read: nobody has to come to a meeting for that.

[Note: asking before a model runs]
A rank that holds shards cannot know what the others lack, and would wait for one of them that raises instead of
running. They cannot meet for that either: a correct program may run a model on some of its ranks alone, or fill and
shard it in another order on each. So each rank posts what it lacks, also when it is filled long before the model runs,
and then reads what those have posted that it needs: the ranks with other shards, those that these need, and so on. It
waits a few seconds for them and goes on, which is safe: a rank that lacks something raises anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from fabric_init._torch_internals import get_default_store
from fabric_init.distributed.meeting import Word
from fabric_init.distributed.store import StoreBoard

PATIENCE = timedelta(seconds=5)
"""How long a rank waits for what others post."""

_posts: Counter[str] = Counter()
"""How often this rank has posted, by subject. Those with the same number belong together."""


class Post(NamedTuple):
    """What one rank says about its part of a model."""

    lacking: Sequence[str] = ()
    """The names of the tensors without values."""
    fixes: Sequence[str] = ()
    """What the user can do about them."""
    ranks: Collection[int] = ()
    """The ranks that this one needs to run the model."""


def post(subject: str, own: Post) -> None:
    """Post what this rank has to say about a ``subject``, which has the same name on all ranks, and go on."""
    if _has_others():
        with suppress(RuntimeError):  # without a store there is nobody to tell
            _leave(subject, own)


def ask(subject: str, own: Post) -> list[Post]:
    """Post what this rank has to say, and return what is posted by all ranks that it needs, itself included."""
    if not _has_others():
        return [own]
    found = {dist.get_rank(): own}
    with suppress(RuntimeError):  # without a store each rank is on its own, and torch says so
        board, number = _leave(subject, own)
        while missing := {rank for each in found.values() for rank in each.ranks} - found.keys():
            in_time = board.wait_for(number, missing)
            there = missing if in_time else [rank for rank in missing if board.has_words(number, [rank])]
            found.update({rank: board.word(number, rank).value for rank in there})
            if not in_time:
                break
    return [found[rank] for rank in sorted(found)]


def _leave(subject: str, own: Post) -> tuple[StoreBoard, int]:
    board = StoreBoard(get_default_store(), f"posted/{subject}", range(dist.get_world_size()), PATIENCE)
    number = _posts[subject]
    _posts[subject] += 1
    board.leave(number, dist.get_rank(), Word(subject, value=own))
    return board, number


def _has_others() -> bool:
    """Return whether this rank is one of several in torch's default group, and these are not only thought of."""
    is_started = dist.is_available() and dist.is_initialized()
    return is_started and dist.get_world_size() > 1 and dist.get_backend() != "fake"
