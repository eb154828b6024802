"""DDP: every rank keeps full tensors with the same values, so that none has to be broadcast."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import lightning.fabric.strategies as lightning_strategies
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_init.checkpoints.tensor_checksums import tensor_checksum
from fabric_init.distributed.agreement import Agreement
from fabric_init.filling.same_on_all_ranks import send_what_differs
from fabric_init.guard.before_forward import require
from fabric_init.guard.waiting_tensors import release_filled, unfilled
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.tensors import Kind
from fabric_init.reports.registry import filled_by_us
from fabric_init.strategies.mixin import DeferredInitMixin
from fabric_init.strategies.registry import register_strategy


class DDPStrategy(DeferredInitMixin, lightning_strategies.DDPStrategy):
    """Lightning's strategy of the same name; models built without values are filled on every rank, in its own memory.

    ``setup_module`` does without DDP's first broadcast of all weights where the ranks have filled the model alike: they
    agreed on seed, checkpoint and plan, and what a constructor took from elsewhere (numpy's random numbers, say) shows
    in checksums over all elements. A model that waits for values is wrapped in DDP once it has them; what the ranks
    would not initialize alike gets rank 0's values in ``setup_module`` already, as from DDP's constructor.
    """

    def placement(self, model: nn.Module) -> Placement:
        return WholeTensors(self.root_device)

    def setup_module(self, module: nn.Module) -> Any:
        release_filled(module)
        if not self.agreement.from_all(["waits"] if unfilled(module) else []):
            return self._wrapped(module)
        if self._ddp_kwargs.get("init_sync", True):
            send_what_differs(module, self._is_sent(module), self.agreement)
        return DDPWhenFilled(module, self._wrapped, self.agreement)

    def _is_sent(self, module: nn.Module) -> Callable[[str, Kind], bool]:
        """Return whether DDP's constructor sends all ranks rank 0's tensor of a name and kind."""
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        options = self._ddp_kwargs
        with_buffers = options.get("broadcast_buffers") is not False or options.get("forward_sync_buffers") is not None
        return lambda name, kind: name not in ignored and (kind == "parameter" or with_buffers)

    def _wrapped(self, module: nn.Module) -> Any:
        options = self._ddp_kwargs
        if self.agreement.alike(_checksums(module) if filled_by_us(module) else None):
            self._ddp_kwargs = {"init_sync": False} | options
        try:
            return super().setup_module(module)
        finally:
            self._ddp_kwargs = options


class DDPWhenFilled(DistributedDataParallel):
    """A model that waits for values, on every rank, and is wrapped in DDP before its first forward.

    DDP keeps hold of the memory that parameters have when it wraps them, so they have to have some by then.
    """

    def __init__(self, module: nn.Module, wrap: Callable[[nn.Module], Any], agreement: Agreement) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.require_backward_grad_sync = True
        vars(self)["_wrap"] = wrap
        vars(self)["_agreement"] = agreement

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the model in DDP, and run it.

        Raises:
            UninitializedTensorError: some of its tensors still wait, on this rank or another.
        """
        wrap, agreement = vars(self).pop("_wrap"), vars(self).pop("_agreement")
        try:
            agreement.run_together("wrapping the model in DDP", lambda: require(self.module, "run"))
        except BaseException:
            vars(self).update(_wrap=wrap, _agreement=agreement)
            raise
        sync, training = self.require_backward_grad_sync, self.training
        hooks = {name: table for name, table in vars(self).items() if name.endswith("_hooks") and table}
        wrapped = wrap(self.module)
        self.__class__ = type(wrapped)
        self.__dict__ = wrapped.__dict__ | hooks | {"require_backward_grad_sync": sync, "training": training}
        return self(*args, **kwargs)


def _checksums(module: nn.Module) -> str:
    """Name, shape and a checksum of every tensor, hashed."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tensor_checksum(tensor)}".encode())
    return digest.hexdigest()


register_strategy(DDPStrategy, instead_of=lightning_strategies.DDPStrategy)
