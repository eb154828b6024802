"""Send tensors from rank 0 to all, with a meeting before each: no rank blocks on one that failed or died."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import timeout_of
from fabric_init.distributed.agreement import RankGroup
from fabric_init.distributed.meeting import Word
from fabric_init.errors import FabricInitError

_LONGEST_TRANSFER = timedelta(seconds=20)
"""How long a rank waits in a collective. All have met right before it, so what takes longer has failed."""


class CheckedBroadcast:
    """The ranks of torch's default process group during one operation; a context manager.

    Order of calls, the same on every rank: :meth:`mine` around what this rank does by itself, then :meth:`roll_call`,
    then :meth:`broadcast`, and so on; at the end a last :meth:`roll_call`.

    The connections are a group of their own (gloo). When a rank dies, only some of the others notice, and the rest
    would block on those. So each rank that notices closes its own connections, which the rest notice in turn, and all
    meet. Ctrl-C takes effect at the next roll call, where the other ranks learn of it.

    Args:
        what: The name of the operation, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._ranks = RankGroup()
        self._telling = ExitStack()
        self._failure: BaseException | None = None
        self._lost = ""
        self._group: dist.ProcessGroup | None = None
        on_gpu = "nccl" in dist.get_backend_config()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        """The device of tensors that are broadcast."""

    def __enter__(self) -> CheckedBroadcast:
        self._telling.enter_context(self._ranks.telling(self._what))
        try:
            self.roll_call()
            self._together(self._connect)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _connect(self) -> None:
        timeout = timeout_of(dist.group.WORLD) or _LONGEST_TRANSFER  # type: ignore[arg-type]
        self._group = dist.new_group(backend="gloo", timeout=min(timeout, _LONGEST_TRANSFER))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._telling.__exit__(kind, error, at)  # the others hear of it before connections close
        finally:
            self._close()

    def _close(self) -> None:
        if self._group is not None:
            with suppress(RuntimeError):
                dist.destroy_process_group(self._group)
            self._group = None

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Keep an error in the block for the next roll call, where the other ranks are going."""
        try:
            yield
        except Exception as error:
            self._failure = error

    def roll_call(self) -> None:
        """Return once all ranks are here, and none has failed.

        Raises:
            FabricInitError: Another rank failed; its message is included. A rank that failed raises its own error.
            RanksLostError: A rank is gone.
        """
        if self._failure is not None:
            raise self._failure
        self._ranks.meet(Word(self._what, lost=self._lost))

    def broadcast(self, tensor: Tensor) -> None:
        """Copy ``tensor``, which is on :attr:`device`, from rank 0 to every rank."""
        if self.device.type == "cpu":
            self._together(lambda: dist.broadcast(tensor, src=0, group=self._group))
            return
        self._together(lambda: dist.broadcast(tensor, src=0))
        self.roll_call()  # NCCL notices nothing: before this rank waits for the GPU, see that all have come this far

    def _together(self, collective: Callable[[], Any]) -> None:
        """Run a collective; where it fails, close the connections, so that others notice, and meet them."""
        try:
            with interrupts_held():
                collective()
            return
        except RuntimeError as error:
            self._lost = str(error)
        # outside of the handler: its traceback would keep the connections open
        self._close()
        self.roll_call()
        raise FabricInitError(f"{self._what}: a collective failed. ({self._lost})")  # a meeting says so before
