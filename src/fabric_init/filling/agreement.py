"""All ranks do the same, or all raise: nobody goes on alone into a collective that the others never reach."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from fabric_init.checkpoints import CheckpointReader, Span
from fabric_init.errors import CheckpointMismatchError, FabricInitError
from fabric_init.filling.plan import Plan

_T = TypeVar("_T")


class RanksLostError(FabricInitError):
    """A rank has died, or cannot be reached."""


class Agreement(Protocol):
    """How the ranks that fill one model keep in step."""

    def same(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str]) -> _T:
        """``make()``, if it raises on no rank and gives the same ``digest`` on all; else an error on every rank."""
        ...

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's ``value``."""
        ...

    def from_all(self, names: Sequence[str]) -> list[str]:
        """The ``names`` of all ranks, each once."""
        ...


class Alone:
    """One process, or one that is not to wait for others."""

    def same(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str]) -> _T:
        return make()

    def from_rank_zero(self, value: Any) -> Any:
        return value

    def from_all(self, names: Sequence[str]) -> list[str]:
        return list(names)


class AllRanks:
    """The ranks of torch's default process group. Every rank has to make the same calls in the same order."""

    def same(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str]) -> _T:
        value: _T | None = None
        failure: Exception | None = None
        try:
            value = make()
            mine = ("is", digest(value))
        except RanksLostError:  # nobody is left to tell
            raise
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            failure = error
            mine = ("failed", f"{type(error).__name__}: {error}")
        outcomes = self._gather(what, mine)
        if failure is not None:
            raise failure
        failed = [(rank, text) for rank, (kind, text) in enumerate(outcomes) if kind == "failed"]
        if failed:
            rank, text = failed[0]
            ranks = ", ".join(str(rank) for rank, _ in failed)
            raise FabricInitError(f"{what} failed on rank {ranks}, so no rank goes on. Rank {rank}: {text}")
        _check_same(what, [text for _, text in outcomes])
        return value  # type: ignore[return-value]

    def alike(self, digest: str | None) -> bool:
        """Whether every rank has this digest, and none has ``None``."""
        outcomes = self._gather("comparing the filled models", ("is" if digest else "unknown", digest or ""))
        return len(set(outcomes)) == 1 and digest is not None

    def from_rank_zero(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def from_all(self, names: Sequence[str]) -> list[str]:
        everyone = self._gather("asking what still waits for values", list(names))
        return list(dict.fromkeys(name for each in everyone for name in each))

    def _gather(self, what: str, mine: Any) -> list[Any]:
        outcomes: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(outcomes, mine)
        except RuntimeError as error:
            raise RanksLostError(
                f"{what}: rank {dist.get_rank()} lost touch with the other ranks; one of them has probably died, and "
                f"its own output says why. ({error})"
            ) from error
        return outcomes


def _check_same(what: str, digests: Sequence[str]) -> None:
    if len(set(digests)) > 1:
        groups: dict[str, list[int]] = {}
        for rank, digest in enumerate(digests):
            groups.setdefault(digest, []).append(rank)
        listed = "; ".join(f"ranks {ranks}: {digest}" for digest, ranks in groups.items())
        raise CheckpointMismatchError(f"{what} is not the same on every rank, so no rank goes on. {listed}")


def checkpoint_digest(reader: CheckpointReader | None) -> str:
    """What tells one checkpoint from another: its header, and a sample of its values."""
    if reader is None:
        return "no checkpoint"
    keys = list(reader.keys())
    digest = hashlib.sha256("\n".join(f"{key} {reader.spec(key)}" for key in keys).encode())
    for key in keys[:: max(1, len(keys) // _SAMPLED)]:  # two files with one header: a few elements of some tensors
        numel = reader.spec(key).shape.numel()
        ends = [reader.read(key, Span(0, min(16, numel))), reader.read(key, Span(max(0, numel - 16), numel))]
        digest.update(b"".join(bytes(end.contiguous().view(torch.uint8).numpy()) for end in ends if end.numel()))
    return f"{reader.path} with {len(keys)} tensors, fingerprint {digest.hexdigest()[:12]}"


_SAMPLED = 32


def plan_digest(plan: Plan) -> str:
    """What tells one plan from another."""
    lines = "\n".join(f"{entry.slot.names} {entry.slot.shape} {entry.action} {entry.keys}" for entry in plan.entries)
    return f"{len(plan.entries)} tensors, plan {hashlib.sha256(lines.encode()).hexdigest()[:12]}"
