"""accelerate: one process, DDP, FSDP2 and DeepSpeed prepare a recorded model, which trains as one that had values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_init import FillModel, UninitializedTensorError, deferred_init, materialize
from tests.stacks.hugging_face import (
    SECONDS,
    STACKS,
    TOKENS,
    config,
    different,
    forget,
    gathered,
    options_of,
    reading_its_part,
    recorded,
    whole,
    write,
)
from tests.support.ranks import run_ranks_each

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

FILLED_BY = ("materialize", "attach")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hugging_face"))


def prepared(accelerator: Any, model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def train(accelerator: Any, model: Any, optimizer: Any, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def filled(stack: str, case: str, by: str, folder: Path) -> tuple[Any, Any, Any]:
    """Prepare a recorded model, as a user would whom the documentation has told how."""
    accelerator, options = STACKS[stack](), options_of(case, folder)
    model = recorded(case, seed=3 + 5 * int(os.environ.get("RANK", 0)))  # the first rank's is for all
    plugin = accelerator.state.deepspeed_plugin
    with reading_its_part(stack, case, folder):
        if by == "attach":
            FillModel(**options).attach(accelerator)
        elif "fsdp2" not in stack:
            materialize(model, **options, deepspeed=plugin and plugin.deepspeed_config)
        model, optimizer = prepared(accelerator, model)
        if by == "materialize" and "fsdp2" in stack:
            materialize(model, **options)
    return accelerator, model, optimizer


def start_and_train(stack: str, case: str, by: str, folder: Path) -> list[object]:
    """Return what differs: at the start from one device, and after three steps from accelerate's own way to start."""
    accelerator, model, optimizer = filled(stack, case, by, folder)
    wanted = whole(case, folder)
    start = gathered(model)
    precise = {name: value.to(start[name].dtype) for name, value in gathered(wanted).items()}
    found: list[object] = [different(start, precise)]
    theirs = STACKS[stack]()
    if stack.startswith("deepspeed") and case in ("checkpoint", "tied"):
        wanted = whole(case, folder)  # anew, as a script would that knows of DeepSpeed by now: it may partition
    wanted, its = prepared(theirs, wanted)
    losses = train(theirs, wanted, its)
    return [*found, train(accelerator, model, optimizer) == losses, different(gathered(model), gathered(wanted))]


def resume(stack: str, by: str, folder: Path) -> list[str]:
    """Return what differs when a recorded model is prepared and ``load_state`` brings the rest."""
    saved = folder / f"state of {stack}, {by}"
    accelerator, model, optimizer = filled(stack, "checkpoint", "attach", folder)
    train(accelerator, model, optimizer)
    accelerator.save_state(str(saved))
    train(accelerator, model, optimizer)
    again = STACKS[stack]()
    restored = recorded(seed=9)
    if by == "attach":
        FillModel(folder / "llama").attach(again)
    restored, its = prepared(again, restored)
    again.load_state(str(saved))
    train(again, restored, its)
    return different(gathered(restored), gathered(model))


def unfilled(stack: str, by: str, folder: Path) -> str:
    accelerator = STACKS[stack]()
    with pytest.raises(UninitializedTensorError, match=r"model\.embed_tokens\.weight"):
        train(accelerator, *prepared(accelerator, recorded()))
    return "refused"


def in_a_block(stack: str, by: str, folder: Path) -> list[str]:
    """Return what differs when transformers, which may partition what it builds, builds a model in a block."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    forget()
    wanted = gathered(whole("checkpoint", folder))
    accelerator = STACKS[stack]()
    with deferred_init():
        if by == "from_config":
            model = AutoModelForCausalLM.from_config(config())
        else:
            model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert is_deepspeed_zero3_enabled()
    if by == "from_config":
        FillModel(folder / "llama").attach(accelerator)
    model, _ = prepared(accelerator, model)
    return different(gathered(model), wanted)


SAME = [[], True, []]
KINDS = {"start": start_and_train, "resume": resume, "unfilled": unfilled, "in a block": in_a_block}
UNFILLED = ["ddp", "fsdp2", "deepspeed 2", "deepspeed 3"]
IN_BLOCKS = ("from_config", "from_pretrained")
STARTS = [
    *((stack, case, by) for stack in ("ddp", "fsdp2") for case in ("checkpoint", "from scratch") for by in FILLED_BY),
    *(("deepspeed 3", case, by) for case in ("checkpoint", "from scratch") for by in FILLED_BY),
    *((f"deepspeed {what}", "checkpoint", "attach") for what in ("1", "2", "3, bf16")),
    *((stack, "missing head", "attach") for stack in ("ddp", "fsdp2", "deepspeed 3")),
    ("deepspeed 3", "tied", "attach"),
    *(("fsdp2", "tied", by) for by in FILLED_BY),
    *((f"fsdp2, {what}", "checkpoint", "attach") for what in ("rank 0 loads", "bf16", "checkpointing")),
]


def run(kind: str, **arguments: Any) -> Any:
    return KINDS[kind](**arguments)


RESUMES = [(stack, "attach") for stack in ("ddp", "fsdp2", "deepspeed 3")] + [("fsdp2", "load_state")]


@pytest.fixture(scope="module")
def on_ranks(ranks: int, folder: Path) -> dict[tuple[str, ...], list[Any]]:
    """Return what each rank returned, by the kind of case and the case: one group of ranks imports the libraries."""
    names = ("kind", "stack", "case", "by")
    each = {("start", *start): dict(zip(names, ("start", *start), strict=True)) for start in STARTS}
    for stack, by in RESUMES:
        each["resume", stack, by] = {"kind": "resume", "stack": stack, "by": by}
    for stack in UNFILLED:
        each["unfilled", stack] = {"kind": "unfilled", "stack": stack, "by": ""}
    for built in IN_BLOCKS:
        each["in a block", built] = {"kind": "in a block", "stack": "deepspeed 3", "by": built}
    return run_ranks_each(ranks, run, each, seconds=SECONDS * ranks / 2, folder=folder)


def test_one_process_starts_and_trains_as_on_a_model_with_values(folder: Path) -> None:
    starts = [(case, by) for case in ("checkpoint", "missing head", "from scratch") for by in FILLED_BY]
    each = {start: dict(zip(("case", "by"), start, strict=True)) for start in starts}
    for start, ranks in run_ranks_each(
        1, start_and_train, each, seconds=SECONDS, stack="one process", folder=folder
    ).items():
        assert ranks == [SAME], start


@pytest.mark.parametrize("start", STARTS, ids=", ".join)
def test_ranks_start_and_train_as_on_a_model_with_values(
    start: tuple[str, ...], ranks: int, on_ranks: dict[tuple[str, ...], list[Any]]
) -> None:
    assert on_ranks[("start", *start)] == [SAME] * ranks


@pytest.mark.parametrize("case", RESUMES, ids=", ".join)
def test_load_state_resumes_a_recorded_model(
    case: tuple[str, ...], ranks: int, on_ranks: dict[tuple[str, ...], list[Any]]
) -> None:
    assert on_ranks[("resume", *case)] == [[]] * ranks


@pytest.mark.parametrize("stack", UNFILLED)
def test_what_nobody_fills_does_not_train(stack: str, ranks: int, on_ranks: dict[tuple[str, ...], list[Any]]) -> None:
    assert on_ranks["unfilled", stack] == ["refused"] * ranks


@pytest.mark.parametrize("built", IN_BLOCKS)
def test_transformers_builds_whole_models_in_a_block_although_it_knows_of_zero_3(
    built: str, ranks: int, on_ranks: dict[tuple[str, ...], list[Any]]
) -> None:
    assert on_ranks["in a block", built] == [[]] * ranks
