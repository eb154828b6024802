"""The public functions that do without Fabric."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fabric_init.checkpoints import Conversion, Source
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.filling.execute import fill_model
from fabric_init.filling.missing import initialize_missing, initialize_possible
from fabric_init.guard.loads import watch_loads
from fabric_init.guard.models import hold, settle
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions
from fabric_init.recording.built_modules import BuiltModules, refuse_scripted
from fabric_init.recording.mode import active, recorded_build
from fabric_init.recording.tape import Rng, check_rng
from fabric_init.reports.init_report import InitReport, report_of
from fabric_init.strategies.fill_in_setup import choose_own_init, is_bound
from fabric_init.strategies.unwrap import original


def materialize(
    model: nn.Module,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    strict: bool = True,
    rename: Rename = None,
    reinit: Sequence[str] = (),
    rng: Rng | None = None,
    mmap: bool = True,
    entry: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    convert: Sequence[Conversion] = (),
) -> InitReport:
    """Give every tensor of a recorded ``model`` its value: from ``checkpoint``, or by the model's own init code.

    Works in place; parameters and buffers stay the same Python objects, so an optimizer made earlier stays valid.
    When it raises, the model is as it was.

    Args:
        model: built under :func:`~fabric_init.deferred_init`.
        device: where tensors are to be; ``None`` leaves each where its constructor asked for it.
        checkpoint: a safetensors file, a folder in Hugging Face layout, a torch file, a folder of
            ``torch.distributed.checkpoint`` (what sharded strategies save) or of DeepSpeed, a URL, or the id of a model
            on the Hugging Face Hub: all that :func:`~fabric_init.checkpoints.open_checkpoint` takes.
        strict: a missing or unexpected key is an error. Otherwise missing tensors get the model's own init and
            unexpected keys are ignored; the report has both.
        rename: regex → replacement, or a callable from checkpoint key to tensor name, or to ``None`` to drop the key.
            Or a list of these, applied in order; :class:`~fabric_init.checkpoints.Part` and
            :class:`~fabric_init.checkpoints.Layers` choose what to load.
        reinit: globs of tensors to initialize afresh although the checkpoint has them.
        rng: ``"per_op"`` or ``"eager"``, see :func:`~fabric_init.deferred_init`; default: as recorded.
        mmap: on the CPU, let the mapped file be the parameters: nothing is copied. ``False`` copies, for a file that
            may be overwritten in place while the model lives.
        entry: the state dict that is meant, by its key, where a torch file or distributed checkpoint holds several.
        manifest: SHA-256 digests that the checkpoint is compared with while it is read: a file as ``sha256sum`` or
            :func:`~fabric_init.checkpoints.write_manifest` writes it.
        convert: what lies otherwise in the checkpoint than in the model: :class:`~fabric_init.checkpoints.Split`,
            ``Fuse``, ``Stack``, ``Unstack``, ``Transpose``, in the checkpoint's own names, before ``rename``.

    Returns:
        What every tensor got, from where; also kept for ``Fabric.init_report``.

    Raises:
        CheckpointError: the file cannot be used.
        CheckpointMismatchError: keys, shapes or dtypes of file and model disagree.
        UninitializedTensorError: neither the checkpoint nor the model's own code gives some tensor a value.
        RecordingError: ``rng`` differs from what the constructor was already shown values of.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"materialize takes a module, not {type(model).__name__}")
    if rng is not None:
        check_rng(rng)
    reader = Source(checkpoint, mmap, entry, manifest, convert).open() if checkpoint is not None else None
    placement = WholeTensors(None if device is None else torch.device(device))
    return fill_model(model, reader, LoadOptions(strict, rename, reinit), placement, rng)


@contextmanager
def deferred_init(*, rng: Rng = "per_op") -> Iterator[None]:
    """Build models in this block without running init kernels or taking memory for weights.

    What the constructors would have done is recorded; :func:`fabric_init.materialize` does it afterwards, once for
    each tensor, or loads the tensor instead. Until then the models cannot run or be saved; ``load_state_dict`` is kept
    for when they have memory. A block inside another one continues the outer recording.

    Args:
        rng: where random numbers will come from. ``"per_op"``: each random op has a generator of its own, so a tensor
            gets the same values whatever else is loaded, on every rank, and tensors can be filled in parallel.
            ``"eager"``: all ops draw from one stream in order, dead ones too: bit-identical to plain PyTorch from the
            same seed. Both depend on the seed that torch's default generator has when the block opens.

    Raises:
        RecordingError: in the block, when a constructor does something that cannot be recorded.
    """
    if active() is not None:
        with recorded_build(rng):
            yield
        return
    with BuiltModules() as built:
        try:
            with recorded_build(rng):
                yield
            refuse_scripted(built.roots())
        finally:
            for model in built.roots():
                hold(model, "fabric_init.materialize(model) gives it memory and values: call that first.")
                watch_loads(model, initialize_possible)


def init_missing(model: nn.Module) -> None:
    """Run the model's own recorded init for whatever is still unfilled, also of what ``setup`` returned.

    A model that its strategy has not sharded yet gets it in ``setup``.

    Raises:
        UninitializedTensorError: the model's own code never gives some tensor a value.
    """
    model = original(model)
    if is_bound(model):
        choose_own_init(model)
    else:
        initialize_missing(model)


def init_report(model: nn.Module) -> InitReport:
    """What every tensor of ``model`` got, from where. Also takes what ``setup`` returned.

    Raises:
        FabricInitError: the model was not built in a recorded block.
    """
    model = original(model)
    settle(model)
    return report_of(model)
