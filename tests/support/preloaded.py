"""What the server of the ranks imports before it forks them, so that they need not: see ``ranks.py``."""

from __future__ import annotations

import contextlib
import gc
import importlib

from fabric_init._gc import PausedCollector

_NAMES = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "torch.distributed.tensor",
    "torch.profiler",
    "safetensors.torch",
    "lightning.fabric",
    "pytest",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # what its setup imports, and torch's compiler with it
    "transformers.models.llama.modeling_llama",
    "peft",
    "tests.support.zoo",
]


def _import_what_is_there() -> None:
    for name in _NAMES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        from tests.support.zoo import without_operators

        without_operators()  # the first question for them calls the compiler


_import_what_is_there()
# A full collection takes seconds in a rank that looks through all of this, and copies it.
gc.collect()
gc.freeze()
with PausedCollector():
    pass  # counts what is frozen, so that no rank does
