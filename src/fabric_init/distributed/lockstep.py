"""Run the same steps on all ranks, and end them together: no rank blocks on one that failed or died."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import get_default_store
from fabric_init.errors import FabricInitError, RanksLostError

_SECONDS_TO_ANSWER = 5.0


class Lockstep:
    """The ranks of torch's default process group during one operation; a context manager.

    Order of calls, the same on every rank: :meth:`mine` around what this rank does by itself, then :meth:`roll_call`,
    then :meth:`broadcast`, and so on; at the end a last :meth:`roll_call`.

    The connections are a group of their own (gloo). When a rank dies, only some of the others notice, and the rest
    would block on those. So each rank that notices closes its own connections, which the rest notice in turn. Ctrl-C
    takes effect at the next roll call, where the other ranks learn of it.

    Args:
        what: The name of the operation, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._failure: BaseException | None = None
        self._group: dist.ProcessGroup | None = None
        self._name = ""
        on_gpu = "nccl" in dist.get_backend_config()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        """The device of tensors that are broadcast."""

    def __enter__(self) -> Lockstep:
        self._group = dist.new_group(backend="gloo")
        self._name = self._group.group_name
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._group is not None and isinstance(error, GeneratorExit):
            self._failure = self._failure or FabricInitError("it was interrupted")
            with suppress(FabricInitError, KeyboardInterrupt):
                self.roll_call()  # the consumer of the tensors has stopped: the other ranks have to know
        all_know = isinstance(error, (Exception, GeneratorExit, type(None))) or error is self._failure
        if self._group is not None and all_know:
            self._missing("done")  # a connection that closes early can lose the last messages
        self._close()
        if kind is None and self._failure is not None:  # Ctrl-C in the last roll call
            raise self._failure

    def _close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Keep an error in the block for the next roll call, where the other ranks are going."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self._failure = error

    def roll_call(self) -> None:
        """Return once all ranks are here, and none has failed.

        Raises:
            FabricInitError: Another rank failed; its message is included. A rank that failed raises its own error.
            RanksLostError: A rank is gone.
        """
        failed = torch.tensor([self._failure is not None], dtype=torch.int64, device="cpu")
        self._together(lambda: dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group))
        if not failed.item():
            return
        failure = self._failure
        texts: list[Any] = [None] * dist.get_world_size()
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        self._together(lambda: dist.all_gather_object(texts, text, group=self._group))
        if failure is not None:
            raise failure
        rank = next(rank for rank, text in enumerate(texts) if text is not None)
        raise FabricInitError(f"{self._what} failed on rank {rank}, so no rank goes on. Rank {rank}: {texts[rank]}")

    def broadcast(self, tensor: Tensor) -> None:
        """Copy ``tensor``, which is on :attr:`device`, from rank 0 to every rank."""
        if self.device.type == "cpu":
            self._together(lambda: dist.broadcast(tensor, src=0, group=self._group))
            return
        self._together(lambda: dist.broadcast(tensor, src=0))
        # NCCL notices nothing: before this rank waits for the GPU, see that all ranks have come as far as this
        self._together(lambda: dist.barrier(group=self._group))

    def _together(self, collective: Callable[[], Any]) -> None:
        try:
            with interrupts_held(self._interrupted):
                collective()
            return
        except RuntimeError as error:
            reason = str(error)
        # outside of the handler: its traceback would keep the connections open
        self._close()
        gone = self._missing("lost")
        which = f"rank {', '.join(map(str, gone))} is gone" if gone else "the ranks lost touch with one another"
        raise RanksLostError(f"{self._what}: {which}, so no rank goes on. The output of what died says why. ({reason})")

    def _interrupted(self) -> None:
        self._failure = self._failure or KeyboardInterrupt()

    def _missing(self, word: str) -> list[int]:
        """Return the ranks that do not put ``word`` into torch's key-value store in time."""
        rank, ranks = dist.get_rank(), range(dist.get_world_size())
        store = PrefixStore(f"fabric_init/{self._name}/{word}", get_default_store())
        end = time.monotonic() + _SECONDS_TO_ANSWER
        missing = []
        try:
            store.set(str(rank), "")
            for other in ranks:
                try:
                    store.wait([str(other)], timedelta(seconds=max(0.1, end - time.monotonic())))
                except dist.DistStoreError:
                    missing.append(other)
        except RuntimeError:  # the store's own process is gone: rank 0's, unless a launcher keeps it
            return [0] if rank else []
        return missing
