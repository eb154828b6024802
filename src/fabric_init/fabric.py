"""``Fabric`` with an ``init_module`` that knows whether the weights will be loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import lightning
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.loggers import Logger
from lightning.fabric.strategies import STRATEGY_REGISTRY, Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fabric_init._lightning_internals import FabricModule, FabricOptimizer, PluginInput, PrecisionInput
from fabric_init._text import counted
from fabric_init.api import init_missing, init_report
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.distributed.who_reads import check_io
from fabric_init.errors import OptionError, RecordingError
from fabric_init.filling.in_setup import is_bound
from fabric_init.guard.waiting_tensors import fix_of, unfilled
from fabric_init.option_names import Io
from fabric_init.planning.options import declared_checkpoint
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.recorded_load.converted import Convert
from fabric_init.recording.mode import active
from fabric_init.reports.init_report import InitReport
from fabric_init.strategies import DeferredInitMixin, FSDP2Strategy
from fabric_init.strategies.init_context import init_context, refuse_nesting
from fabric_init.strategies.registry import require_deferred_init, with_deferred_init
from fabric_init.strategies.unwrap import original

_T = TypeVar("_T")

_MSG_FILL_FIRST = "Call fabric_init.materialize(model), or build the model under fabric.init_module(...), before setup"

if "fsdp2" not in STRATEGY_REGISTRY:  # also looked up for the variable LT_STRATEGY, which `fabric run` sets
    STRATEGY_REGISTRY.register("fsdp2", FSDP2Strategy)


class Fabric(lightning.Fabric):
    """:class:`lightning.Fabric`, whose :meth:`init_module` builds models without running init kernels.

    Takes Lightning's arguments, and ``io``. See :meth:`init_module` for what is new.

    Args:
        accelerator: The hardware to run on: ``"cpu"``, ``"cuda"``, ``"mps"``, ``"gpu"``, ``"tpu"`` or ``"auto"``.
        strategy: A strategy, or its name: ``"ddp"``, ``"fsdp"``, ``"fsdp2"``, ``"deepspeed"``, ``"auto"`` and so on.
        devices: The number of devices of each machine, a list of their indices, or ``"auto"``.
        num_nodes: The number of machines.
        precision: ``"32-true"``, ``"bf16-true"``, ``"bf16-mixed"`` and so on; ``None`` for the default of the device.
        plugins: One plugin, or a list.
        callbacks: One callback, or a list.
        loggers: One logger, or a list.
        io: How the ranks read a checkpoint. ``"local"``: each rank reads what it keeps. ``"broadcast"``: rank 0 reads
            each tensor once and sends it to the other ranks, 64 MiB at a time; they need no access to the file.
            ``"auto"``: broadcast if every rank keeps the whole model, there are several machines, and the file is on a
            network file system; else local.

    Raises:
        ValueError: ``io`` is none of the three, or Lightning refuses an argument.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: PrecisionInput | None = None,
        plugins: PluginInput | list[PluginInput] | None = None,
        callbacks: list[Any] | Any | None = None,
        loggers: Logger | list[Logger] | None = None,
        io: Io = "auto",
    ) -> None:
        check_io(io)
        super().__init__(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
            callbacks=callbacks,
            loggers=loggers,
        )
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
        convert: Convert = (),
    ) -> AbstractContextManager[None]:
        """Return a context in which a model is built on the right device and in the right precision.

        ================================  ==================================  =======================================
        call                              in the block                        after it (one device)
        ================================  ==================================  =======================================
        ``init_module()``                 eager, as in Lightning              initialized
        ``init_module(empty_init=True)``  recorded, no init kernel runs       allocated but uninitialized: load values,
                                                                              or call :meth:`init_missing`
        ``init_module(checkpoint=path)``  recorded, no init kernel runs       filled
        ================================  ==================================  =======================================

        All options but ``empty_init`` need a ``checkpoint``.

        Args:
            empty_init: Whether to skip the model's own init. ``None`` skips it if there is a ``checkpoint``.
            checkpoint: A safetensors file, a folder in Hugging Face layout, a torch file, a folder of
                ``torch.distributed.checkpoint`` (which sharded strategies save) or of DeepSpeed, a URL, or the id of a
                model on the Hugging Face Hub: all that :func:`~fabric_init.checkpoints.open_checkpoint` takes.
            strict: Whether a missing or unexpected key is an error. With ``False``, missing tensors get the model's own
                init and extra keys are ignored; :meth:`init_report` lists both.
            rename: A mapping from regular expression to replacement, or a callable that takes a checkpoint key and
                returns a tensor name, or ``None`` to drop the key; or a list of these, applied in order.
                :class:`~fabric_init.checkpoints.Part` and :class:`~fabric_init.checkpoints.Layers` select what to load.
            reinit: Globs of tensor names to initialize afresh even if the checkpoint has them (a new head, say).
            mmap: On the CPU, let parameters use the memory-mapped file, so that nothing is copied. ``False`` copies;
                use it for a file that may be overwritten in place while the model lives.
            entry: The key of the state dict to load, if a torch file or distributed checkpoint holds several.
            manifest: A file of SHA-256 digests, as ``sha256sum`` or :func:`~fabric_init.checkpoints.write_manifest`
                writes it. The checkpoint is verified against them while it is read.
            convert: Conversions for tensors that the checkpoint stores in another layout than the model:
                :class:`~fabric_init.checkpoints.Split`, ``Fuse``, ``Stack``, ``Unstack``, ``Transpose``. They use the
                names of the checkpoint, and are applied before ``rename``.
                Or functions by new key, ``{"merged": lambda s: s["a"] @ s["b"].T}``, which get the tensors of the
                checkpoint by key and may use any operation of torch. Keys that they use are gone afterwards.

        Raises:
            CheckpointError: On entry, if the file cannot be used.
            CheckpointMismatchError: On entry, if the file is not as ``convert`` declares; on exit, if keys, shapes or
                dtypes of file and model disagree.
            OptionError: ``empty_init=False`` with a ``checkpoint``, an option of a load without one, or, on exit,
                ``reinit`` matches no tensor.
            UninitializedTensorError: On exit, if neither file nor model gives some tensor a value.
            RecordingError: For a block in a recorded block, one that builds no model, or several for one checkpoint.
        """
        self._validate_launched()
        if isinstance(empty_init, (str, os.PathLike)):
            raise TypeError(f"pass the path of a checkpoint by name: init_module(checkpoint={str(empty_init)!r})")
        with self._telling():  # an option that is wrong on one rank is an error on all
            options = LoadOptions(strict, rename, reinit)
            source = declared_checkpoint(
                checkpoint, options, mmap=mmap, entry=entry, manifest=manifest, convert=convert
            )
            if source is not None:
                if empty_init is False:
                    raise OptionError(
                        "empty_init=False contradicts checkpoint=…: a declared load never runs init first"
                    )
                return init_context(require_deferred_init(self.strategy), source, options)
            if empty_init:
                return init_context(require_deferred_init(self.strategy))
        refuse_nesting()
        return super().init_module(empty_init=empty_init)

    def _telling(self) -> AbstractContextManager[None]:
        strategy = self.strategy
        return strategy.agreement.telling("init_module") if isinstance(strategy, DeferredInitMixin) else nullcontext()

    def init_missing(self, model: nn.Module) -> None:
        """Run the model's own recorded init for every tensor that has no value yet.

        Args:
            model: A model that was built under :meth:`init_module`, or what ``setup`` returned for it.

        Raises:
            UninitializedTensorError: The model's own code never gives some tensor a value.
        """
        init_missing(model)

    def init_report(self, model: nn.Module) -> InitReport:
        """Return the report on ``model``: for each tensor its status, and where its value came from.

        Args:
            model: A model that was built under :meth:`init_module`, or what ``setup`` returned for it.

        Raises:
            FabricInitError: The model was not built in a recorded block.
        """
        return init_report(model)

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: LRScheduler | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """As Lightning's, on all ranks or on none; also fills a model that its strategy shards.

        Args:
            module: The model.
            optimizers: Its optimizers. They get the parameters that the strategy makes.
            scheduler: A learning rate scheduler.
            move_to_device: Whether to move the model to this rank's device.

        Returns:
            The wrapped model; with optimizers, a tuple of it, the optimizers, and the scheduler if there is one.

        Raises:
            RecordingError: The model was recorded and nothing was declared to fill it, or this is in a recorded block.
            CheckpointMismatchError: Keys, shapes or dtypes of a declared checkpoint and the model disagree.
            FabricInitError: The setup failed on another rank.
        """
        set_up = partial(
            super().setup,
            module,
            *optimizers,
            scheduler=scheduler,  # type: ignore[arg-type]  # Lightning says _LRScheduler, and takes any
            move_to_device=move_to_device,
            _reapply_compile=_reapply_compile,
        )
        return self._on_all_ranks(module, set_up)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> FabricModule:
        """As ``setup``, without optimizers."""
        return self._on_all_ranks(module, partial(super().setup_module, module, move_to_device, _reapply_compile))

    def _validate_setup(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        if is_bound(original(module)):  # an optimizer's parameters are filled in place, or replaced in the optimizer
            optimizers = [optimizer for optimizer in optimizers if isinstance(optimizer, FabricOptimizer)]
        super()._validate_setup(module, optimizers)

    def _on_all_ranks(self, module: nn.Module, set_up: Callable[[], _T]) -> _T:
        """Return what ``set_up`` returns, if it raises on no rank."""
        self._validate_launched()  # before ranks are asked: there is no process group yet

        def checked() -> _T:
            _require_tensors(module)
            return set_up()

        if not isinstance(self.strategy, DeferredInitMixin):
            return checked()
        return self.strategy.agreement.run_together("setting the model up", checked)


def _require_tensors(module: nn.Module) -> None:
    """Raise if a recorded model has no values and nothing will fill it in setup; torch's own message is no help."""
    if active() is not None:
        raise RecordingError("setup inside a recorded block: the model has no values yet. Call it after the block.")
    module = original(module)
    on_meta = [name for name, tensor in module.named_parameters() if tensor.is_meta]
    if on_meta:
        raise RecordingError(
            f"{counted(len(on_meta), 'parameter')} on the meta device (first: {on_meta[0]}). {_MSG_FILL_FIRST}."
        )
    if (fix := fix_of(module)) is not None and not is_bound(module):
        raise RecordingError(f"{type(module).__name__} has no values yet (first: {unfilled(module)[0][0]}). {fix}")
