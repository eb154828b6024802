"""An ``Accelerator`` of Hugging Face's accelerate, made to fill recorded models: before it wraps them, or once sharded.

``transformers.Trainer``, TRL's trainers and loops of one's own all hand their models to ``Accelerator.prepare``. FSDP2
shards a recorded model there as it does any other, so that is filled afterwards, and each rank reads what it keeps. For
ZeRO-3 it is partitioned while it is filled, by the configuration that DeepSpeed will get. All else wants values: one
device and DDP move and send them, FSDP and the other stages of DeepSpeed copy them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from typing import Any

import torch
from torch import nn

from fabric_init.guard.waiting_tensors import unfilled
from fabric_init.planning.reinit import is_reinitialized
from fabric_init.planning.tensors import plain_name
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.sharding.dtensor import local
from fabric_init.trainer.declared_load import Declared, declare


class FillingMixin:
    """What an accelerator gets from :func:`let_fill`."""

    declared: Declared
    """What models are filled from."""
    is_fsdp2: bool
    device: torch.device
    device_placement: bool
    distributed_type: Any
    state: Any

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare as before; models among the arguments have their values afterwards."""
        theirs: Any = super()
        models = [each for each in args if isinstance(each, nn.Module)]
        if not models or not self.is_fsdp2:
            self._fill(models)
            return theirs.prepare(*args, **kwargs)
        declared = [for_base(self.declared, model) for model in models]  # by names that sharding does not change
        with self._each_rank_reads(models):
            result = theirs.prepare(*args, **kwargs)
        for each, model in zip(declared, models, strict=True):
            each.fill(model, None)
        return result

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Prepare one model as before; it has its values afterwards."""
        theirs: Any = super()
        if not self.is_fsdp2:
            self._fill([model])
        return theirs.prepare_model(model, *args, **kwargs)

    def _fill(self, models: list[nn.Module]) -> None:
        for model in models:
            for_base(self.declared, model).fill(model, self._fills_on(), _deepspeed_of(self))

    def _fills_on(self) -> torch.device | None:
        shards_later = str(self.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
        return self.device if self.device_placement and not shards_later else None

    @contextmanager
    def _each_rank_reads(self, models: list[nn.Module]) -> Iterator[None]:
        """Context in which rank 0 does not send all values to the others: it has none either."""
        plugin = self.state.fsdp_plugin
        before = plugin.cpu_ram_efficient_loading
        if any(unfilled(model) for model in models):
            plugin.cpu_ram_efficient_loading = False
        try:
            yield
        finally:
            plugin.cpu_ram_efficient_loading = before


def let_fill(accelerator: Any, declared: Declared) -> None:
    """Let ``accelerator`` fill recorded models that it prepares from now on.

    Raises:
        OptionError: Something else was declared for it.
    """
    declare(accelerator, declared, "Accelerator")
    if not isinstance(accelerator, FillingMixin):
        theirs = type(accelerator)
        accelerator.__class__ = type(theirs.__name__, (FillingMixin, theirs), {"__module__": theirs.__module__})


def let_trainer_fill(trainer: Any, declared: Declared) -> None:
    """Let a trainer of transformers or TRL fill its recorded model: now, or when FSDP2 has sharded it.

    Now, because it may be asked to evaluate, or to resume from adapters alone, before it prepares the model.
    """
    let_fill(trainer.accelerator, declared)
    if trainer.model is not None and not trainer.accelerator.is_fsdp2:
        its = _deepspeed_of(trainer.accelerator)
        for_base(declared, trainer.model).fill(trainer.model, None, its)  # which the trainer has moved


def _deepspeed_of(accelerator: Any) -> Mapping[str, Any] | None:
    """Return the configuration that ``accelerator`` will give to DeepSpeed; ``None`` if it uses none."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.deepspeed_config


def accelerator_of(trainer: object) -> Any:
    """Return the ``Accelerator`` that ``trainer`` is or has; ``None`` for Lightning's, whose own is something else."""
    return next((each for each in (trainer, getattr(trainer, "accelerator", None)) if _is_accelerator(each)), None)


def _is_accelerator(candidate: object) -> bool:
    return any(
        cls.__name__ == "Accelerator" and cls.__module__.partition(".")[0] == "accelerate"
        for cls in type(candidate).__mro__
    )


def for_base(declared: Declared, model: nn.Module) -> Declared:
    """Return ``declared`` for ``model``: if that is one of peft, a checkpoint is for the model that has got adapters.

    peft renames the tensors of that one. Adapters are initialized by peft, or have been.
    """
    if declared.options["checkpoint"] is None or not any(cls.__name__ == "PeftModel" for cls in type(model).__mro__):
        return declared
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    named = {plain_name(name): (_name_in_base(name, model), recorded(local(tensor))) for name, tensor in tensors}
    current = {base: name for name, (base, _) in named.items() if base is not None}
    fresh = [
        name
        for name, (base, found) in named.items()
        if base is None or found is None or is_reinitialized([base], declared.options["reinit"])
    ]
    rename = declared.options["rename"]
    rules = [] if rename is None else list(rename) if isinstance(rename, (list, tuple)) else [rename]
    options = {"rename": [*rules, lambda key: current.get(key, key)], "reinit": [escape(name) for name in fresh]}
    return Declared({**declared.options, **options}, declared.part)


def _name_in_base(name: str, model: Any) -> str | None:
    """Return the name that a tensor of a peft ``model`` has without adapters; ``None`` for what belongs to them."""
    base = model.get_base_model()
    prefix = next(f"{prefix}." for prefix, module in model.named_modules() if module is base)
    if not name.startswith(prefix):
        return None
    module, parts = base, []
    path = plain_name(name.removeprefix(prefix)).split(".")
    for part in path:
        if part in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            return None
        if part == "modules_to_save" and hasattr(module, "original_module"):
            return None
        if part not in ("base_layer", "original_module"):
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)
