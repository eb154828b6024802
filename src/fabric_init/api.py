"""The public functions that work without Fabric."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from fabric_init._gc import PausedCollector
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.distributed.agreement import Agreement, agreement_of
from fabric_init.distributed.who_reads import open_on_all_ranks
from fabric_init.errors import RecordingError
from fabric_init.filling.execute import fill_model
from fabric_init.filling.in_setup import choose_own_init, is_bound
from fabric_init.filling.incremental import filled_by_module
from fabric_init.filling.init_missing import initialize_missing, initialize_possible
from fabric_init.filling.report_rows import report_so_far
from fabric_init.guard.guard_model import guard_model
from fabric_init.guard.loads import watch_loads
from fabric_init.guard.waiting_tensors import release_filled
from fabric_init.planning.checkpoint_source import CheckpointSource
from fabric_init.planning.options import declared_checkpoint
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.recorded_load.converted import Convert
from fabric_init.planning.tensors import Walk
from fabric_init.recording.in_block.built_modules import BuiltModules, refuse_scripted
from fabric_init.recording.mode import active, recorded_build
from fabric_init.recording.tape.tape import Rng, Tape, check_rng, now
from fabric_init.reports.init_report import InitReport
from fabric_init.reports.registry import report_of
from fabric_init.sharding.in_block import ShardsInBlock
from fabric_init.strategies.unwrap import original
from fabric_init.strategies.zero3 import built_whole, cast_as_configured, partitioned, stage_3_config

_MSG_NOT_A_DEVICE = (
    'device={device!r} is no device such as "cuda:0" or "cpu". If it is the path of a checkpoint, pass it as '
    "checkpoint={device!r}."
)


def materialize(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    strict: bool = True,
    rename: Rename = None,
    reinit: Sequence[str] = (),
    rng: Rng | None = None,
    mmap: bool = True,
    entry: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    convert: Convert = (),
    process_group: dist.ProcessGroup | Literal[False] | None = None,
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> InitReport:
    """Give every tensor of a recorded ``model`` its value: from ``checkpoint``, or by the model's own init code.

    The model may have been sharded since it was recorded, by ``fully_shard``, ``parallelize_module``,
    ``distribute_tensor`` or several of these: each rank then reads and allocates only what it keeps.

    Works in place; parameters and buffers stay the same Python objects, so an optimizer made earlier stays valid.
    Shapes and dtypes are those of the model; what the checkpoint holds in another precision is cast. If this raises,
    the model is as it was before. All options but ``device`` and ``rng`` need a ``checkpoint``.

    Args:
        model: A module that was built under :func:`~fabric_init.deferred_init`.
        device: The device for all tensors. ``None`` leaves each on the device that its constructor asked for.
        checkpoint: A safetensors file, a folder in Hugging Face layout, a torch file, a folder of
            ``torch.distributed.checkpoint`` (which sharded strategies save) or of DeepSpeed, a GGUF file, a URL, or the
            id of a model on the Hugging Face Hub: all that :func:`~fabric_init.checkpoints.open_checkpoint` takes.
            ``None`` initializes everything.
        strict: Whether a missing or unexpected key is an error. With ``False``, missing tensors get the model's own
            init and extra keys are ignored; the report lists both.
        rename: A mapping from regular expression to replacement, or a callable that takes a checkpoint key and returns
            a tensor name, or ``None`` to drop the key; or a list of these, applied in order.
            :class:`~fabric_init.checkpoints.Part` and :class:`~fabric_init.checkpoints.Layers` select what to load.
        reinit: Globs of tensor names to initialize afresh even if the checkpoint has them.
        rng: ``"per_op"`` or ``"eager"``, see :func:`~fabric_init.deferred_init`. ``None`` means: as recorded.
        mmap: On the CPU, let parameters use the memory-mapped file, so that nothing is copied. ``False`` copies; use
            it for a file that may be overwritten in place while the model lives.
        entry: The key of the state dict to load, if a torch file or distributed checkpoint holds several.
        manifest: A file of SHA-256 digests, as ``sha256sum`` or :func:`~fabric_init.checkpoints.write_manifest` writes
            it. The checkpoint is verified against them while it is read.
        convert: Conversions for tensors that the checkpoint stores in another layout than the model:
            :class:`~fabric_init.checkpoints.Split`, ``Fuse``, ``Stack``, ``Unstack``, ``Transpose``, and
            ``Dequantize()`` for quantized weights. They use the names of the checkpoint, and are applied before
            ``rename``.
            Or functions by new key, ``{"merged": lambda s: s["a"] @ s["b"].T}``, which get the tensors of the
            checkpoint by key and may use any operation of torch. Keys that they use are gone afterwards.
        process_group: The ranks that hold the model together, or each a copy of it: all have to call this, with the
            same arguments. If one fails, all raise, and all draw what the first of them draws. ``None`` means torch's
            default group, if ``torch.distributed`` is initialized; pass the ranks of one stage where ranks hold
            different parts of the model (pipeline parallelism), or ``False`` for this process alone.
        deepspeed: The configuration that ``deepspeed.initialize`` will get, or the path of its JSON file. If it says
            ZeRO stage 3, the parameters are cast and partitioned as ``deepspeed.zero.Init(module=model)`` does, and
            each rank reads and allocates its slices alone. Call ``deepspeed.init_distributed()`` before, and
            ``deepspeed.initialize`` afterwards. If this fails after partitioning, the model cannot be used any more.

    Returns:
        A report with a row for each tensor, which holds its status and where its value came from. Later,
        :func:`~fabric_init.init_report` returns it too.

    Raises:
        CheckpointError: The file cannot be used.
        CheckpointMismatchError: Keys, shapes or dtypes of checkpoint and model disagree.
        FabricInitError: Another rank failed, the ranks do not agree, or a tensor was sharded in an unknown way.
        OptionError: An option of a load was given without ``checkpoint``, or ``reinit`` matches no tensor.
        RecordingError: ``rng`` differs from the mode of random values that the constructor has already read.
        TypeError: ``model`` is not a module, or ``device`` is not a device.
        UninitializedTensorError: Neither the checkpoint nor the model's own code gives some tensor a value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"materialize takes a torch.nn.Module, not {type(model).__name__}")
    if rng is not None:
        check_rng(rng)
    target = _device(device)
    options = LoadOptions(strict, rename, reinit)
    source = declared_checkpoint(checkpoint, options, mmap=mmap, entry=entry, manifest=manifest, convert=convert)
    agreement = agreement_of(process_group)
    stage_3 = None if deepspeed is None else stage_3_config(deepspeed)
    partition = None if stage_3 is None else functools.partial(partitioned, model, stage_3, target)
    cast = nullcontext() if stage_3 is None else cast_as_configured(model, stage_3)
    with PausedCollector(), agreement.telling("materialize"), cast:
        fill_model(model, _opened(source, agreement), options, WholeTensors(target), rng, agreement, partition)
        return report_of(model)


@contextmanager
def param_init_fn(
    model: nn.Module,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    strict: bool = True,
    rename: Rename = None,
    reinit: Sequence[str] = (),
    entry: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    convert: Convert = (),
    process_group: dist.ProcessGroup | Literal[False] | None = None,
) -> Iterator[Callable[[nn.Module], None]]:
    """Fill a recorded ``model`` while ``FullyShardedDataParallel`` (FSDP1) wraps it, one unit after the other::

        with param_init_fn(model, checkpoint=path) as init:
            model = FullyShardedDataParallel(model, param_init_fn=init, auto_wrap_policy=policy)

    Each rank has one unit in full at a time. FSDP2 needs none of this: call :func:`materialize` after ``fully_shard``.

    Args:
        model: A module that was built under :func:`deferred_init`, and not wrapped or sharded since.
        checkpoint: As for :func:`materialize`, like all other arguments.
        strict: Whether a missing or unexpected key is an error.
        rename: How keys become names.
        reinit: Globs of tensor names to initialize afresh.
        entry: The key of the state dict to load.
        manifest: A file of SHA-256 digests.
        convert: Conversions for tensors that the checkpoint stores in another layout.
        process_group: The ranks that hold the model together.

    Raises:
        FabricInitError: As :func:`materialize`; planning is done when the context is entered.
    """
    options = LoadOptions(strict, rename, reinit)
    source = declared_checkpoint(checkpoint, options, mmap=True, entry=entry, manifest=manifest, convert=convert)
    agreement = agreement_of(process_group)
    with ExitStack() as stack:
        stack.enter_context(agreement.telling("param_init_fn"))
        yield stack.enter_context(filled_by_module(model, _opened(source, agreement), options, agreement))


def _opened(source: CheckpointSource | None, agreement: Agreement) -> CheckpointReader | None:
    """Return the reader of a declared checkpoint, of which each rank reads what it keeps; ``None`` if there is none."""
    if source is None:
        return None
    return open_on_all_ranks(source, "local", whole=False, machines=1, agreement=agreement)


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise TypeError(_MSG_NOT_A_DEVICE.format(device=device)) from None


@contextmanager
def deferred_init(*, rng: Rng = "per_op") -> Iterator[None]:
    """Build models in this block without running init kernels or allocating memory for weights.

    The ops of the constructors are recorded. :func:`fabric_init.materialize` replays them later, once for each tensor,
    or loads the tensor instead. Until then the models cannot run or be saved; what ``load_state_dict`` or other code
    writes whole gets memory at once. A block inside another one continues the outer recording. Ranks of one process
    group need not all have a block; but if one ends with an error, so does what all of them do together next.

    Args:
        rng: Where random numbers come from. ``"per_op"``: each random op has its own generator, so a tensor gets the
            same values on every rank, whatever else is loaded, and tensors can be filled in parallel. ``"eager"``: all
            ops draw from one stream in their order, including those whose result is overwritten, so values are
            bit-identical to plain PyTorch from the same seed. Both depend on the seed that torch's default generator
            has when the block is entered.

    Raises:
        RecordingError: In the block, if a constructor does something that cannot be recorded.
        ValueError: ``rng`` is neither of the two.
    """
    if active() is not None:
        with recorded_build(rng):
            yield
        return
    telling = agreement_of(None).telling("the deferred_init block", patience=1.0)  # the others may not be waiting
    shards, start = ShardsInBlock(), now()
    tape: Tape | None = None
    with telling, PausedCollector(), built_whole(), BuiltModules() as built:
        try:
            with recorded_build(rng, shards) as tape:
                yield
        except BaseException:
            with suppress(RecordingError):
                if tape is not None:
                    _hold_recorded(built.roots(), shards, tape, start)
            raise
        for walk in _hold_recorded(built.roots(), shards, tape, start):
            refuse_scripted(walk.once)


def _hold_recorded(models: list[nn.Module], shards: ShardsInBlock, tape: Tape, start: int) -> list[Walk]:
    """Let ``models`` wait for values, and again what a block since ``start`` has written of models of earlier ones."""
    walks = [Walk(model) for model in models]
    earlier = [
        model for owners in tape.after_block.owners if (model := owners.model()) is not None and model not in models
    ]
    tape.after_block.waiting.begin_again(start)
    with shards.handed_over(walks, earlier) as held:
        for model in held:
            guard_model(model, "fabric_init.materialize(model) gives it memory and values: call that first.")
            watch_loads(model, initialize_possible)
    return walks


def init_missing(model: nn.Module, *, process_group: dist.ProcessGroup | Literal[False] | None = None) -> None:
    """Run the model's own recorded init for every tensor that has no value yet.

    Args:
        model: A model that was built in a recorded block, or what ``setup`` returned for it. If its strategy fills it
            in ``setup`` and has not done so yet, the init runs there.
        process_group: The ranks that hold a sharded model together, as for :func:`materialize`; not needed for one
            that was built through Fabric.

    Raises:
        UninitializedTensorError: The model's own code never gives some tensor a value.
    """
    model = original(model)
    if is_bound(model):
        choose_own_init(model)
    else:
        initialize_missing(model, lambda: agreement_of(process_group))


def init_report(model: nn.Module) -> InitReport:
    """Return the report on ``model`` as it is now: for each tensor its status, and where its value came from.

    Args:
        model: A model that was built in a recorded block, or what ``setup`` returned for it.

    Raises:
        FabricInitError: The model was not built in a recorded block.
    """
    model = original(model)
    release_filled(model)
    return report_so_far(model)
