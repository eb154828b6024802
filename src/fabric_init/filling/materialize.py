"""From a recorded model to a usable one, in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.checkpoints import CheckpointReader, Conversion, Source
from fabric_init.checkpoints.renaming import Rename
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.filling.agreement import Agreement, Alone, plan_digest
from fabric_init.filling.computed import check_nothing_is_undone
from fabric_init.filling.deferred import loaded_since, refuse_lost_writes, release_recorded
from fabric_init.filling.extra_state import find_extra_slots
from fabric_init.filling.fill import check_ties, fill
from fabric_init.filling.judging import make_plan
from fabric_init.filling.loading import set_extra_states
from fabric_init.filling.placement import Placement, WholeTensors
from fabric_init.filling.plan import Plan, Wanted
from fabric_init.filling.report import InitReport, keep_report
from fabric_init.filling.slots import Slot, find_slots
from fabric_init.recording.collector import PausedCollector
from fabric_init.recording.tape import Rng, Tape, check_rng, recorded

_ALONE = Alone()
_PLANNING = "planning the initialisation"


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
        reinit: globs of tensors to initialise afresh although the checkpoint has them.
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
    return fill_model(model, reader, Wanted(strict, rename, reinit), placement, rng)


def fill_model(
    model: nn.Module,
    reader: CheckpointReader | None,
    wanted: Wanted,
    placement: Placement,
    rng: Rng | None = None,
    agreement: Agreement = _ALONE,
) -> InitReport:
    """:func:`materialize`, for any placement, an open checkpoint and ranks that agree."""

    def plan() -> Prepared:
        source, asked = _with_earlier_load(model, reader, wanted)
        return plan_for(model, source, asked, rng)

    with PausedCollector():
        prepared = agreement.same(_PLANNING, plan, prepared_digest)
        return carry_out(prepared, model, prepared.tensors, placement, agreement)


class Prepared(NamedTuple):
    """A plan for one model, and all that it takes to carry it out."""

    plan: Plan
    tensors: list[Tensor]
    tapes: Mapping[int, Tape]
    reader: CheckpointReader | None
    exact: bool


def plan_for(model: nn.Module, reader: CheckpointReader | None, wanted: Wanted, rng: Rng | None = None) -> Prepared:
    """Plan for ``model``, while its tensors are still recorded and whole. Raises all that is the user's to mend."""
    slots, tensors, tapes = survey(model)
    exact = _exact(set(tapes.values()), rng)
    plan = make_plan(slots, tapes, reader, wanted, find_extra_slots(model))
    check_nothing_is_undone(plan.entries, tapes)
    return Prepared(plan, tensors, tapes, reader, exact)


def prepare(
    model: nn.Module,
    reader: CheckpointReader | None,
    wanted: Wanted,
    agreement: Agreement = _ALONE,
) -> Prepared:
    """:func:`plan_for`, on ranks that agree."""
    return agreement.same(_PLANNING, lambda: plan_for(model, reader, wanted), prepared_digest)


def prepared_digest(prepared: Prepared) -> str:
    """What tells one plan from another."""
    return plan_digest(prepared.plan)


def carry_out(
    prepared: Prepared, model: nn.Module, tensors: Sequence[Tensor], placement: Placement, agreement: Agreement = _ALONE
) -> InitReport:
    """Fill ``tensors``: the plan's own, or what a strategy has made of them."""
    plan, _, tapes, reader, exact = prepared

    def check_and_fill() -> InitReport:
        check_ties(plan, reader, placement)
        report = fill(plan, tensors, tapes, reader, placement, exact=exact)
        set_extra_states(plan.extras)
        return report

    report = agreement.same("filling the model", check_and_fill, lambda report: "")
    release_recorded(model)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN's layout: the constructor's own call came before there was memory
    keep_report(model, report)
    return report


def survey(model: nn.Module) -> tuple[list[Slot], list[Tensor], Mapping[int, Tape]]:
    """The model's slots, their tensors, and the tape of each recorded storage among them."""
    slots: list[Slot] = []
    tensors: list[Tensor] = []
    tapes: dict[int, Tape] = {}
    for slot, tensor in find_slots(model):
        slots.append(slot)
        tensors.append(tensor)
        if slot.ref is not None:
            with torch._C.DisableTorchFunction():
                found = recorded(tensor)
            assert found is not None
            tapes[found.storage] = found.tape
    return slots, tensors, tapes


def _with_earlier_load(
    model: nn.Module, reader: CheckpointReader | None, wanted: Wanted
) -> tuple[CheckpointReader | None, Wanted]:
    """The checkpoint to fill from, where ``load_state_dict`` was called on the recorded model before."""
    refuse_lost_writes(model)
    earlier = loaded_since(model)
    if earlier is None or (reader is not None and wanted.strict):
        return reader, wanted  # a strict load brings everything anyway
    if reader is not None:
        raise FabricInitError(
            f"load_state_dict has brought {len(earlier.keys())} tensors into this recorded model, and {reader.path} "
            "is to fill it as well, not strictly. Load the second one once the model has values."
        )
    return earlier, Wanted(strict=False)


def _exact(tapes: set[Tape], rng: Rng | None) -> bool:
    modes = {tape.rng for tape in tapes}
    mode = rng or ("eager" if modes == {"eager"} else "per_op")
    for tape in tapes:
        if tape.sealed_rng not in (None, mode):
            raise RecordingError(
                f"rng={mode!r}, but the constructor has seen random values that were drawn with "
                f"rng={tape.sealed_rng!r} (through .item(), .tolist() or the like). "
                f"Record with deferred_init(rng={mode!r})."
            )
    return mode == "eager"
