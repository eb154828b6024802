"""The ways to get a Llama ready on one device. Each is a function that prepares and returns the part to be timed.

What stands before the inner function is outside the clock: imports, the config, a Fabric object, warming the page
cache with the file that this way reads. The inner function is what a user writes, and returns the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from _log_times import times_in_log
from _verification import Expected, count_unfilled
from _workload import INIT_SEED, Workload, default_dtype, warm
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

Build = Callable[[], nn.Module]
STEPS = ("open", "record", "plan", "fill")
"""Up to the block, the block itself, up to the plan, and from there on: values, report, and the end of the guard."""
IN_STEPS = ("ours_fabric", "ours_core")
TOKENS = 8


def phases(name: str, root: str) -> Generator[tuple[str, Callable[[], Any]], Any, None]:
    workload = Workload(Path(root))
    expected = EXPECTED.get(name, "checkpoint")
    build = CONTENDERS[name](workload)
    # Another seed than the reference's, so that a tensor which was not loaded cannot look as if it were.
    torch.manual_seed(INIT_SEED if expected != "checkpoint" else INIT_SEED + 1)
    steps: dict[str, float] = {}
    model = yield "ready", lambda: _in_steps(build, steps) if name in IN_STEPS else build()
    if model is None:
        return
    if steps:
        yield "steps", lambda: steps
    yield "forward", lambda: _forward(model)
    yield "verify", lambda: count_unfilled(model, workload, expected)


def _in_steps(build: Build, steps: dict[str, float]) -> nn.Module:
    """Build a model with ours, and note how long each step took, by the three messages of our log in between."""
    started = time.perf_counter()
    with times_in_log("record", "plan") as messages:
        model = build()
    times = [started, *messages, time.perf_counter()]
    if len(times) == len(STEPS) + 1:
        steps.update((step, after - before) for step, before, after in zip(STEPS, times, times[1:], strict=False))
    return model


def _forward(model: nn.Module) -> None:
    with torch.inference_mode():
        model(torch.arange(TOKENS)[None])


def _config(workload: Workload) -> LlamaConfig:
    return LlamaConfig.from_pretrained(workload.folder)


# With a checkpoint ---------------------------------------------------------------------------------------------------


def plain(workload: Workload) -> Build:
    from safetensors.torch import load_file

    config = _config(workload)
    warm(workload.safetensors)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16):
            model = LlamaForCausalLM(config)
        model.load_state_dict(load_file(workload.safetensors))
        return model

    return build


def lightning(workload: Workload) -> Build:
    from lightning.fabric import Fabric

    config = _config(workload)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    warm(workload.torch_file)

    def build() -> nn.Module:
        with fabric.init_module(empty_init=True):
            model = LlamaForCausalLM(config)
        fabric.load_raw(workload.torch_file, model)
        return model

    return build


def accelerate(workload: Workload) -> Build:
    # The quickest of the documented calls here: naming the file and the one device spares it looking for both.
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    config = _config(workload)
    warm(workload.safetensors)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), init_empty_weights():
            model = LlamaForCausalLM(config)
        return load_checkpoint_and_dispatch(model, str(workload.safetensors), device_map={"": "cpu"})

    return build


def transformers(workload: Workload) -> Build:
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = _config(workload)
    warm(workload.safetensors)

    def build() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(workload.folder, config=config, dtype=torch.bfloat16)

    return build


def hand_written(workload: Workload) -> Build:
    from safetensors.torch import load_file

    config = _config(workload)
    warm(workload.safetensors)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(load_file(workload.safetensors), assign=True)
        return model

    return build


def hand_written_repaired(workload: Workload) -> Build:
    """The same by someone who knows which buffers of this very model it leaves on meta."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _config(workload)
    unrepaired = hand_written(workload)

    def build() -> nn.Module:
        model = unrepaired()
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
        return model

    return build


def ours_fabric(workload: Workload) -> Build:
    from fabric_init import Fabric

    config = _config(workload)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    warm(workload.safetensors)

    def build() -> nn.Module:
        with fabric.init_module(checkpoint=workload.folder):
            model = LlamaForCausalLM(config)
        return model

    return build


def ours_core(workload: Workload) -> Build:
    from fabric_init import deferred_init, materialize

    config = _config(workload)
    warm(workload.safetensors)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), deferred_init():
            model = LlamaForCausalLM(config)
        materialize(model, checkpoint=workload.folder)
        return model

    return build


def ours_load_state_dict(workload: Workload) -> Build:
    from safetensors.torch import load_file

    model_of = _ours_empty(workload)
    warm(workload.safetensors)

    def build() -> nn.Module:
        _, model = model_of()
        model.load_state_dict(load_file(workload.safetensors))
        return model

    return build


def ours_load_raw(workload: Workload) -> Build:
    model_of = _ours_empty(workload)
    warm(workload.torch_file)

    def build() -> nn.Module:
        fabric, model = model_of()
        fabric.load_raw(workload.torch_file, model)
        return model

    return build


def _ours_empty(workload: Workload) -> Callable[[], tuple[Any, nn.Module]]:
    from fabric_init import Fabric

    config = _config(workload)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")

    def build() -> tuple[Any, nn.Module]:
        with fabric.init_module(empty_init=True):
            return fabric, LlamaForCausalLM(config)

    return build


# From scratch --------------------------------------------------------------------------------------------------------


def eager(workload: Workload) -> Build:
    config = _config(workload)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16):
            return LlamaForCausalLM(config)

    return build


def ours_per_op(workload: Workload) -> Build:
    from fabric_init import deferred_init, materialize

    config = _config(workload)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), deferred_init():
            model = LlamaForCausalLM(config)
        materialize(model)
        return model

    return build


def ours_init_missing(workload: Workload) -> Build:
    model_of = _ours_empty(workload)

    def build() -> nn.Module:
        fabric, model = model_of()
        fabric.init_missing(model)
        return model

    return build


def ours_eager_stream(workload: Workload) -> Build:
    from fabric_init import deferred_init, materialize

    config = _config(workload)

    def build() -> nn.Module:
        with default_dtype(torch.bfloat16), deferred_init():
            model = LlamaForCausalLM(config)
        materialize(model, rng="eager")
        return model

    return build


CONTENDERS: dict[str, Callable[[Workload], Build]] = {
    contender.__name__: contender
    for contender in (
        plain,
        lightning,
        accelerate,
        transformers,
        hand_written,
        hand_written_repaired,
        ours_fabric,
        ours_core,
        ours_load_state_dict,
        ours_load_raw,
        eager,
        ours_per_op,
        ours_init_missing,
        ours_eager_stream,
    )
}

EXPECTED: dict[str, Expected] = {
    "eager": "init",
    "ours_per_op": "like init",
    "ours_init_missing": "like init",
    "ours_eager_stream": "init",
}
