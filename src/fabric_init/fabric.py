"""``Fabric`` with an ``init_module`` that knows whether the weights will be loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import lightning
import torch
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as LightningModelParallelStrategy
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import fabric_init.strategies.single_device  # noqa: F401  (registers its placement)
from fabric_init.checkpoints import CheckpointReader, open_checkpoint
from fabric_init.checkpoints.renaming import Rename
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.filling.agreement import Agreement, checkpoint_digest
from fabric_init.filling.guard import allocate, initialise_rest, release, settle
from fabric_init.filling.materialize import fill_model
from fabric_init.filling.placement import Placement
from fabric_init.filling.plan import Wanted
from fabric_init.filling.report import InitReport, report_of
from fabric_init.recording.empty_init import _EmptyInit, active
from fabric_init.recording.modules import BuiltModules
from fabric_init.strategies.ddp import without_first_broadcast
from fabric_init.strategies.deepspeed import DeepSpeedStrategy, refresh_masters, user_module
from fabric_init.strategies.fsdp2 import FSDP2Strategy, ModelParallelStrategy
from fabric_init.strategies.placement import agreement_of, placement_of
from fabric_init.strategies.sharded import bind, is_bound


class Fabric(lightning.Fabric):
    """:class:`lightning.Fabric`, whose :meth:`init_module` builds models without running init kernels.

    Takes the same arguments. See :meth:`init_module` for what is new.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("strategy") == "fsdp2":
            kwargs["strategy"] = FSDP2Strategy()
        super().__init__(*args, **kwargs)
        if type(self._strategy) is LightningModelParallelStrategy:
            self._strategy.__class__ = ModelParallelStrategy  # the same state, and knows how to fill shards
        elif type(self._strategy) is LightningDeepSpeedStrategy:
            self._strategy.__class__ = DeepSpeedStrategy

    def init_module(
        self,
        empty_init: bool | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        strict: bool = True,
        rename: Rename = None,
        reinit: Sequence[str] = (),
        mmap: bool = True,
    ) -> AbstractContextManager[None]:
        """Context in which a model is built on the right device and in the right precision.

        ================================  ==================================  =======================================
        call                              in the block                        after it (one device)
        ================================  ==================================  =======================================
        ``init_module()``                 eager, as in Lightning              initialised
        ``init_module(empty_init=True)``  recorded, no init kernel runs       has memory but no values: load them, or
                                                                              call :meth:`init_missing`
        ``init_module(checkpoint=path)``  recorded, no init kernel runs       filled
        ================================  ==================================  =======================================

        Args:
            empty_init: skip the model's own init. ``None`` means: only if ``checkpoint`` declares a load.
            checkpoint: a safetensors file, a folder in Hugging Face layout, or a torch file, that fills the model.
            strict: a missing or unexpected key is an error. Otherwise missing tensors get the model's own init and
                unexpected keys are ignored; :meth:`init_report` has both.
            rename: regex → replacement, or a callable, from checkpoint key to tensor name; ``None`` drops a key.
            reinit: globs of tensors to initialise afresh although the checkpoint has them (a new head, say).
            mmap: on the CPU, let the mapped file be the parameters: nothing is copied. ``False`` copies, for a file
                that may be overwritten in place while the model lives.

        Raises:
            CheckpointError: when entered, if the file cannot be used.
            CheckpointMismatchError: when left, if keys, shapes or dtypes of file and model disagree.
            UninitializedTensorError: when left, if neither file nor model gives some tensor a value.
            RecordingError: for a block in a recorded block, one that builds no model, or several for one checkpoint.
        """
        self._validate_launched()
        if isinstance(empty_init, (str, os.PathLike)):
            raise TypeError(f"a path goes in by name: init_module(checkpoint={str(empty_init)!r})")
        if checkpoint is None:
            if rename is not None or reinit or not strict:
                raise FabricInitError("strict, rename and reinit say how to load checkpoint=…, which is missing")
            if not empty_init:
                _refuse_nesting()
                return super().init_module(empty_init=False)
            return self._recorded_block(None, Wanted())
        if empty_init is False:
            raise FabricInitError("empty_init=False contradicts checkpoint=…: a declared load never runs init first")
        return self._recorded_block(checkpoint, Wanted(strict, rename, reinit), mmap)

    @contextmanager
    def _recorded_block(
        self, checkpoint: str | os.PathLike[str] | None, wanted: Wanted, mmap: bool = True
    ) -> Iterator[None]:
        _refuse_nesting()
        sharded = isinstance(self.strategy, ModelParallelStrategy) or (
            isinstance(self.strategy, DeepSpeedStrategy) and self.strategy.zero_stage_3
        )
        placement = None if sharded else placement_of(self.strategy)
        agreement = agreement_of(self.strategy)
        reader = None
        if checkpoint is not None:  # a bad path fails before the build
            path = checkpoint
            reader = agreement.same(
                "opening the checkpoint", lambda: open_checkpoint(path, mmap=mmap), checkpoint_digest
            )
        with ExitStack() as contexts:
            built = contexts.enter_context(BuiltModules())
            recording = contexts.enter_context(_EmptyInit(agree=agreement.from_rank_zero))
            if self.device != torch.get_default_device():  # a default device makes every call in the block slower
                contexts.enter_context(self.device)
            contexts.enter_context(self.strategy.precision.module_init_context())
            yield

        def built_models() -> list[nn.Module]:
            models = built.roots()
            if not models and (reader is not None or recording.tape.storages):
                raise RecordingError("no module was built in this init_module block; build the model inside it")
            if reader is not None:
                _one_model(models, reader)
            return models

        models = agreement.same("building the model", built_models, lambda models: f"{len(models)} models")
        _complete(models, reader, wanted, placement, agreement)

    def init_missing(self, model: nn.Module) -> None:
        """Run the model's own recorded init for whatever is still unfilled.

        Raises:
            UninitializedTensorError: the model's own code never gives some tensor a value.
        """
        initialise_rest(_original(model))
        if isinstance(model, _FabricModule):
            refresh_masters(model._forward_module)

    def init_report(self, model: nn.Module) -> InitReport:
        """What every tensor of ``model`` got, from where. Also takes what :meth:`setup` returned.

        Raises:
            FabricInitError: the model was not built under :meth:`init_module` with a recorded block.
        """
        model = _original(model)
        report = report_of(model)
        waiting = {id(row) for row in settle(model)}
        release(model)
        report.rows = [row for row in report.rows if row.status != "unfilled" or id(row) in waiting]
        return report

    def setup(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._before_setup(module)
        with without_first_broadcast(self.strategy, _original(module)):
            return super().setup(module, *args, **kwargs)

    def setup_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._before_setup(module)
        with without_first_broadcast(self.strategy, _original(module)):
            return super().setup_module(module, *args, **kwargs)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        if isinstance(self.strategy, ModelParallelStrategy):
            for optimizer in optimizers:
                self.strategy.adopt(optimizer)
        return super().setup_optimizers(*optimizers)

    def _before_setup(self, module: nn.Module) -> None:
        module = _original(module)
        if active() is not None:
            raise RecordingError("setup inside a recorded block: the model has no values yet. Call it after the block.")
        settle(module)
        release(module)
        if is_bound(module):
            with _EmptyInit():  # setup casts the model to the precision: that belongs to its recording, too
                self.strategy.precision.convert_module(module)
        else:
            _require_recorded_to_be_filled(module)


def _original(model: nn.Module) -> nn.Module:
    """The module that the user built, without what Fabric, DDP and torch.compile put around it."""
    while True:
        if isinstance(model, (_FabricModule, DistributedDataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        elif (inner := user_module(model)) is not model:
            model = inner
        else:
            return model


def _refuse_nesting() -> None:
    if active() is not None:
        raise RecordingError(
            "init_module inside a recorded block: build both models in one block, or one after the other"
        )


def _complete(
    models: list[nn.Module],
    reader: CheckpointReader | None,
    wanted: Wanted,
    placement: Placement | None,
    agreement: Agreement,
) -> None:
    if placement is None:
        for model in models:
            bind(model, reader, wanted)
        return
    if reader is None:
        allocate(models, placement)
        return
    fill_model(models[0], reader, wanted, placement, agreement=agreement)


def _one_model(models: list[nn.Module], reader: CheckpointReader) -> None:
    if len(models) > 1:
        names = ", ".join(sorted(type(model).__name__ for model in models))
        raise RecordingError(
            f"{len(models)} models were built in one init_module(checkpoint={str(reader.path)!r}) block: {names}. "
            "Give each its own block, so that it is clear which one the checkpoint is for."
        )


def _require_recorded_to_be_filled(module: nn.Module) -> None:
    """A recorded model that is still on the meta device cannot be set up; torch's own message does not say why."""
    waiting = [name for name, tensor in module.named_parameters() if tensor.is_meta]
    if waiting:
        raise RecordingError(
            f"{len(waiting)} parameters are on the meta device (first: {waiting[0]}). Call "
            "fabric_init.materialize(model), or build the model under fabric.init_module(...), before setup."
        )
