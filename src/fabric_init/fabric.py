"""``Fabric`` with an ``init_module`` that knows whether the weights will be loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.wrappers import _FabricOptimizer
from torch import nn
from torch.optim import Optimizer

from fabric_init.api import init_missing, init_report
from fabric_init.checkpoints import Conversion, Source
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.distributed.io import Io, check_io
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.guard.models import fix_of, unfilled
from fabric_init.planning.plan import LoadOptions
from fabric_init.recording.mode import active
from fabric_init.reports.init_report import InitReport
from fabric_init.strategies import DeferredInitMixin, FSDP2Strategy
from fabric_init.strategies.fill_in_setup import is_bound
from fabric_init.strategies.init_context import init_context, refuse_nesting
from fabric_init.strategies.mixin import require_deferred_init, with_deferred_init
from fabric_init.strategies.unwrap import original


class Fabric(lightning.Fabric):
    """:class:`lightning.Fabric`, whose :meth:`init_module` builds models without running init kernels.

    Takes the same arguments, and one more. See :meth:`init_module` for what is new.

    Args:
        io: how the ranks read a checkpoint. ``"local"``: each reads what it keeps. ``"broadcast"``: rank 0 reads each
            tensor once and sends it to the others, 64 MiB at a time; they need not have the file.
            ``"auto"``: broadcast where every rank keeps the whole model, there are several machines, and the file is
            on a network file system; else local.
    """

    def __init__(self, *, io: Io = "auto", **kwargs: Any) -> None:
        check_io(io)
        if "fsdp2" not in STRATEGY_REGISTRY:  # there it is found by name, also in LT_STRATEGY under `fabric run`
            STRATEGY_REGISTRY.register("fsdp2", FSDP2Strategy)
        super().__init__(**kwargs)
        with_deferred_init(self._strategy)
        if io != "auto" and isinstance(self._strategy, DeferredInitMixin):
            self._strategy.io = io

    def init_module(
        self,
        empty_init: bool | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        strict: bool = True,
        rename: Rename = None,
        reinit: Sequence[str] = (),
        mmap: bool = True,
        entry: str | None = None,
        manifest: str | os.PathLike[str] | None = None,
        convert: Sequence[Conversion] = (),
    ) -> AbstractContextManager[None]:
        """Context in which a model is built on the right device and in the right precision.

        ================================  ==================================  =======================================
        call                              in the block                        after it (one device)
        ================================  ==================================  =======================================
        ``init_module()``                 eager, as in Lightning              initialized
        ``init_module(empty_init=True)``  recorded, no init kernel runs       has memory but no values: load them, or
                                                                              call :meth:`init_missing`
        ``init_module(checkpoint=path)``  recorded, no init kernel runs       filled
        ================================  ==================================  =======================================

        Args:
            empty_init: skip the model's own init. ``None`` means: only if ``checkpoint`` declares a load.
            checkpoint: what fills the model: a safetensors file, a folder in Hugging Face layout, a torch file, a
                folder of ``torch.distributed.checkpoint`` (what sharded strategies save) or of DeepSpeed, a URL, or the
                id of a model on the Hugging Face Hub: all that :func:`~fabric_init.checkpoints.open_checkpoint` takes.
            strict: a missing or unexpected key is an error. Otherwise missing tensors get the model's own init and
                unexpected keys are ignored; :meth:`init_report` has both.
            rename: regex → replacement, or a callable from checkpoint key to tensor name, or to ``None`` to drop it.
                Or a list of these, applied in order; :class:`~fabric_init.checkpoints.Part` and
                :class:`~fabric_init.checkpoints.Layers` choose what to load.
            reinit: globs of tensors to initialize afresh although the checkpoint has them (a new head, say).
            mmap: on the CPU, let the mapped file be the parameters: nothing is copied. ``False`` copies, for a file
                that may be overwritten in place while the model lives.
            entry: the state dict that is meant, by its key, where a torch file or distributed checkpoint holds several.
            manifest: SHA-256 digests that the checkpoint is compared with while it is read: a file as ``sha256sum`` or
                :func:`~fabric_init.checkpoints.write_manifest` writes it.
            convert: what lies otherwise in the checkpoint than in the model: :class:`~fabric_init.checkpoints.Split`,
                ``Fuse``, ``Stack``, ``Unstack``, ``Transpose``, in the checkpoint's own names, before ``rename``.

        Raises:
            CheckpointError: when entered, if the file cannot be used.
            CheckpointMismatchError: when entered, if the file is not as ``convert`` declares; when left, if keys,
                shapes or dtypes of file and model disagree.
            UninitializedTensorError: when left, if neither file nor model gives some tensor a value.
            RecordingError: for a block in a recorded block, one that builds no model, or several for one checkpoint.
        """
        self._validate_launched()
        if isinstance(empty_init, (str, os.PathLike)):
            raise TypeError(f"a path goes in by name: init_module(checkpoint={str(empty_init)!r})")
        if checkpoint is None:
            if rename is not None or reinit or convert or not strict:
                raise FabricInitError("strict, rename, reinit and convert are for a checkpoint=…, which is missing")
            if not empty_init:
                refuse_nesting()
                return super().init_module(empty_init=False)
            return init_context(require_deferred_init(self.strategy))
        if empty_init is False:
            raise FabricInitError("empty_init=False contradicts checkpoint=…: a declared load never runs init first")
        source, wanted = Source(checkpoint, mmap, entry, manifest, convert), LoadOptions(strict, rename, reinit)
        return init_context(require_deferred_init(self.strategy), source, wanted)

    def init_missing(self, model: nn.Module) -> None:
        """Run the model's own recorded init for whatever is still unfilled.

        Raises:
            UninitializedTensorError: the model's own code never gives some tensor a value.
        """
        init_missing(model)

    def init_report(self, model: nn.Module) -> InitReport:
        """What every tensor of ``model`` got, from where. Also takes what ``setup`` returned.

        Raises:
            FabricInitError: the model was not built under :meth:`init_module` with a recorded block.
        """
        return init_report(model)

    def setup(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._set_up_together(super().setup, module, *args, **kwargs)

    def setup_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._set_up_together(super().setup_module, module, *args, **kwargs)

    def _validate_setup(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        if is_bound(original(module)):  # an optimizer's parameters are filled in place, or replaced in the optimizer
            optimizers = [optimizer for optimizer in optimizers if isinstance(optimizer, _FabricOptimizer)]
        super()._validate_setup(module, optimizers)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        if isinstance(self.strategy, DeferredInitMixin):
            for optimizer in optimizers:
                self.strategy.adopt(optimizer)
        return super().setup_optimizers(*optimizers)

    def _set_up_together(self, set_up: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def whole_setup() -> Any:
            _require_tensors(module)
            return set_up(module, *args, **kwargs)

        if not isinstance(self.strategy, DeferredInitMixin):
            return whole_setup()
        return self.strategy.agreement.same("setting the model up", whole_setup, lambda _: "")


def _require_tensors(module: nn.Module) -> None:
    """Refuse a model without memory that nobody will fill; torch's own message does not say why."""
    if active() is not None:
        raise RecordingError("setup inside a recorded block: the model has no values yet. Call it after the block.")
    module = original(module)
    waiting = [name for name, tensor in module.named_parameters() if tensor.is_meta]
    if waiting:
        raise RecordingError(f"{len(waiting)} parameters are on the meta device (first: {waiting[0]}). {_FIX}.")
    if (fix := fix_of(module)) is not None and not is_bound(module):
        first = unfilled(module)[0][0]
        raise RecordingError(f"{type(module).__name__} has no values yet (first: {first}). {fix}")


_FIX = "Call fabric_init.materialize(model), or build the model under fabric.init_module(...), before setup"
