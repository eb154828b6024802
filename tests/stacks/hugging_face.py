"""What the tests of Hugging Face's stacks have in common: a tiny Llama, its folders, and accelerate on gloo.

[Note: DeepSpeed of accelerate on a CPU]
accelerate lets DeepSpeed be where there are GPUs. :func:`deepspeed_ranks` sets by hand what ``PartialState`` sets with
GPUs, and nothing else.

[Note: FSDP2 of accelerate on a CPU]
accelerate takes its FSDP plugin into account where it finds several GPUs, and forgets it otherwise. All of its FSDP2
code runs on gloo as well, so :func:`fsdp2` sets by hand what ``AcceleratorState`` sets with GPUs, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabric_init import deferred_init, materialize
from tests.support.watched import bytes_read

SECONDS = 180.0
"""How long a group of ranks may take: each imports half a dozen large libraries, which a busy machine is slow at."""

TOKENS = torch.arange(24).reshape(2, 12) % 39 + 1


def config(**options: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=32, pad_token_id=0, **options)


def write(folder: Path) -> Path:
    """Write the folders of a model, and of one whose embedding is tied; return where."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config()).save_pretrained(folder / "llama")
        LlamaForCausalLM(config(tie_word_embeddings=True)).save_pretrained(folder / "tied")
    return folder


CASES: dict[str, dict[str, Any]] = {
    "checkpoint": {"checkpoint": "llama"},
    "tied": {"checkpoint": "tied"},
    "missing head": {"checkpoint": "llama", "reinit": ["lm_head.*"]},
    "from scratch": {},
}


def options_of(case: str, folder: Path) -> dict[str, Any]:
    """Return the arguments of ``materialize``, or of ``FillModel``."""
    options = dict(CASES[case])
    return {**options, "checkpoint": folder / options["checkpoint"]} if options else options


def recorded(case: str = "checkpoint", seed: int = 3, rng: Literal["per_op", "eager"] = "per_op") -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    with deferred_init(rng=rng):
        return LlamaForCausalLM(config(tie_word_embeddings=case == "tied"))


def whole(case: str, folder: Path) -> Any:
    """Return the model with values on this rank alone: as ``from_pretrained`` gives it, where that is all."""
    from transformers import LlamaForCausalLM

    if case in ("checkpoint", "tied"):
        return LlamaForCausalLM.from_pretrained(folder / CASES[case]["checkpoint"]).train()
    model = recorded(case)
    materialize(model, process_group=False, **options_of(case, folder))
    return model


def forget() -> None:
    """Let accelerate start anew, with nothing in the environment that an earlier case has put there."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def one_process() -> Any:
    from accelerate import Accelerator

    forget()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return Accelerator(cpu=True)


def ddp() -> Any:
    from accelerate import Accelerator

    forget()
    return Accelerator(cpu=True)


def fsdp2(precision: str = "no", **options: Any) -> Any:
    """Return an ``Accelerator`` that shards with FSDP2; see [Note: FSDP2 of accelerate on a CPU]."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    forget()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, **options
    )
    accelerator = Accelerator(cpu=True, mixed_precision=precision, fsdp_plugin=plugin)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    os.environ["FSDP_VERSION"] = "2"
    return accelerator


def deepspeed_ranks() -> None:
    """Let accelerate take these ranks for some of DeepSpeed; see [Note: DeepSpeed of accelerate on a CPU]."""
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    forget()
    deepspeed.init_distributed("gloo")
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED


def deepspeed(stage: int, precision: str = "no") -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin

    deepspeed_ranks()
    plugin = DeepSpeedPlugin(zero_stage=stage)
    accelerator = Accelerator(mixed_precision=precision, deepspeed_plugin=plugin)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # there is no loader that would say so
    return accelerator


def deepspeed_config(stage: int) -> dict[str, Any]:
    """Return a configuration that leaves to a trainer what it can."""
    zero = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    rest = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(rest, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **dict.fromkeys(zero, "auto")},
    }


STACKS: dict[str, Callable[[], Any]] = {
    "one process": one_process,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2, rank 0 loads": lambda: fsdp2(cpu_ram_efficient_loading=True),
    "fsdp2, bf16": lambda: fsdp2("bf16"),
    "fsdp2, checkpointing": lambda: fsdp2(activation_checkpointing=True),
    "deepspeed 1": lambda: deepspeed(1),
    "deepspeed 2": lambda: deepspeed(2),
    "deepspeed 3": lambda: deepspeed(3),
    "deepspeed 3, bf16": lambda: deepspeed(3, "bf16"),
}
SHARDED = ("fsdp2", "deepspeed 3")
"""How the names of stacks start on which each rank reads its part alone."""


@contextmanager
def reading_its_part(stack: str, case: str, folder: Path) -> Iterator[None]:
    """Context that fails if this rank reads another amount than what it keeps."""
    name = CASES[case].get("checkpoint")
    state = load_file(folder / name / "model.safetensors") if name else {}
    with bytes_read() as so_far:
        yield
    check_share(so_far(), state, int(os.environ.get("WORLD_SIZE", 1)) if stack.startswith(SHARDED) else 1)


def check_share(read: int, state: dict[str, Tensor], ranks: int) -> None:
    """Fail if more than 1.05 of an even share was read, and a few values of each tensor, by which ranks agree on it."""
    share, compared = sum(value.nbytes for value in state.values()) / ranks, 32 * 4 * len(state)
    assert 0.5 * share <= read <= 1.05 * share + compared, f"{read} bytes were read, of a share of {share}"


def plain(name: str) -> str:
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def gathered(model: Any) -> dict[str, Tensor]:
    """Return all weights, whole."""
    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if partitioned and not any(parameter.numel() for parameter in partitioned):
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            return gathered(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {plain(n): (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors}


def different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not equal in every bit, or that one of the two lacks."""
    names = found.keys() | wanted.keys()
    return sorted(n for n in names if n not in found or n not in wanted or not torch.equal(found[n], wanted[n]))
