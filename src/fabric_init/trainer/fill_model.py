"""The callback by which a user declares what a Trainer's model is filled from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.errors import OptionError
from fabric_init.planning.options import declared_checkpoint
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.recorded_load.converted import Convert
from fabric_init.trainer.declared_load import Declared
from fabric_init.trainer.hf_accelerate import accelerator_of, let_fill, let_trainer_fill
from fabric_init.trainer.lightning_strategy import let_record

_T = TypeVar("_T")


class FillModel(Callback):
    """A callback for Lightning's ``Trainer``: its model is recorded, and filled before its strategy takes it.

    What ``LightningModule.configure_model`` builds is recorded, and may be sharded there, as for
    ``ModelParallelStrategy``. So is a model that is built under :func:`~fabric_init.deferred_init`, or, once
    :meth:`attach` was called, under ``Trainer.init_module(empty_init=True)``. When the strategy is set up, each rank
    reads or computes what it keeps. Then the strategy moves and wraps the model, and optimizers are made. What
    callbacks have computed from the model by then, such as the copy of ``EMAWeightAveraging``, is computed from its
    values. With ZeRO-3, too, each rank has it whole.

    With ``ckpt_path=…`` that checkpoint is what fills the model. What is declared here is what a lenient load
    (``LightningModule.strict_loading``) leaves.

    The options are those of :func:`~fabric_init.materialize`. All but ``checkpoint`` need one.

    Args:
        checkpoint: The checkpoint that the model is loaded from; ``None`` for the model's own init.
        part: The name of the submodule that the checkpoint is for, such as ``"model"``; all else gets its own init.
            ``""`` is the whole ``LightningModule``.
        strict: Whether a missing or unexpected key is an error. With ``False``, missing tensors get the model's own
            init and extra keys are ignored.
        rename: A mapping from regular expression to replacement, or a callable from checkpoint key to tensor name.
        reinit: Globs of tensor names to initialize afresh even if the checkpoint has them.
        mmap: On the CPU, let parameters use the memory-mapped file.
        entry: The key of the state dict to load, if a torch file or distributed checkpoint holds several.
        manifest: A file of SHA-256 digests, which the checkpoint is verified against.
        convert: Conversions for tensors that the checkpoint stores in another layout than the model.

    Raises:
        OptionError: An option of a load was given without ``checkpoint``.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        part: str = "",
        strict: bool = True,
        rename: Rename = None,
        reinit: Sequence[str] = (),
        mmap: bool = True,
        entry: str | None = None,
        manifest: str | os.PathLike[str] | None = None,
        convert: Convert = (),
    ) -> None:
        source: dict[str, Any] = {"mmap": mmap, "entry": entry, "manifest": manifest, "convert": convert}
        options = LoadOptions(strict, rename, reinit)
        declared_checkpoint(checkpoint, options, **source)  # which refuses options that have no effect
        if part and checkpoint is None:
            raise OptionError(f"no checkpoint=… to load from, so part={part!r} has no effect")
        self._declared = Declared(source | vars(options) | {"checkpoint": checkpoint}, part)

    def attach(self, trainer: _T) -> _T:
        """Let ``trainer`` fill the models that it is given or builds from now on.

        A ``Trainer`` of Lightning records, too, what is built under ``trainer.init_module(empty_init=True)``. Those of
        Hugging Face, and an ``Accelerator``, fill models that were recorded under
        :func:`~fabric_init.deferred_init`. If such a model is one of peft, the checkpoint is for its base.

        Args:
            trainer: A ``Trainer`` of Lightning, which need not have this callback; one of transformers or TRL; or an
                ``Accelerator`` of accelerate.

        Returns:
            The same trainer.

        Raises:
            FabricInitError: The model cannot be filled, or is built in a way that cannot be recorded.
        """
        accelerator = accelerator_of(trainer)
        if accelerator is trainer:
            let_fill(accelerator, self._declared)
            return trainer
        if accelerator is not None:
            let_trainer_fill(trainer, self._declared)
            return trainer
        let_record(trainer.strategy, self._declared)  # type: ignore[attr-defined]
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self not in callbacks:
            callbacks.insert(0, self)
        return trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the strategy of ``trainer`` record what ``configure_model``, which comes next, will build."""
        self.attach(trainer)
        trainer.strategy.configures = True  # type: ignore[attr-defined]
