"""``transformers.Trainer``: one process, DDP, FSDP2 and DeepSpeed train a recorded model as ``from_pretrained``'s."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fabric_init import FillModel, UninitializedTensorError, init_report
from tests.stacks.hugging_face import (
    SECONDS,
    STACKS,
    deepspeed_config,
    deepspeed_ranks,
    different,
    gathered,
    options_of,
    reading_its_part,
    recorded,
    whole,
    write,
)
from tests.support.ranks import run_ranks_each

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hugging_face"))


def data() -> Any:
    import datasets

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 40, (8,), generator=generator).tolist() for _ in range(24)]
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def trainer(stack: str, folder: Path, **options: Any) -> Any:
    """Return a Trainer; what accelerate is told in ``STACKS`` is what it uses."""
    from transformers import Trainer, TrainingArguments

    config = deepspeed_config(int(stack[-1])) if stack.startswith("deepspeed") else None
    STACKS[stack]() if config is None else deepspeed_ranks()
    saving = options.pop("saving", None)
    arguments = TrainingArguments(
        output_dir=str(folder / f"{stack} {saving}"),
        use_cpu=config is None,
        deepspeed=config,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no" if saving is None else "steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        accelerator_config={"use_configured_state": True},
    )
    return Trainer(args=arguments, train_dataset=data(), eval_dataset=data(), **options)


def trained(one: Any, resume: str | None = None) -> dict[str, Tensor]:
    one.train(resume_from_checkpoint=resume)
    return gathered(one.model)


@cache
def theirs(stack: str, case: str, folder: Path) -> dict[str, Tensor]:
    """Return the weights after three steps from the Trainer's own way to start."""
    return trained(trainer(stack, folder, model=whole(case, folder)))


def start_and_train(stack: str, case: str, folder: Path) -> list[object]:
    """Return what differs after three steps from the Trainer's own way to start, and how many tensors were loaded."""
    made = trainer(stack, folder, model=recorded(case, _seed()))
    with reading_its_part(stack, case, folder):
        ours = FillModel(**options_of(case, folder)).attach(made)
        found = trained(ours)
    wanted = theirs(stack, case, folder)
    loaded = [row for row in init_report(ours.model).rows if row.status == "loaded"]
    return [different(found, wanted), len(loaded)]


def _seed() -> int:
    return 3 + 5 * int(os.environ.get("RANK", 0))  # the first rank's is for all


def built_by_model_init(stack: str, case: str, folder: Path) -> list[str]:
    ours = FillModel(**options_of(case, folder)).attach(trainer(stack, folder, model_init=recorded_anew))
    return different(trained(ours), theirs(stack, case, folder))


def recorded_anew() -> Any:
    with torch.random.fork_rng(devices=[]):  # the order of the data is drawn next
        return recorded()


def resumed(stack: str, case: str, folder: Path) -> list[list[str]]:
    """Return what differs when training goes on after two steps of three, with and without a declared load."""
    options = options_of(case, folder)
    first = FillModel(**options).attach(trainer(stack, folder, model=recorded(), saving="first"))
    first.train()
    wanted = theirs(stack, case, folder)
    saved = os.path.join(first.args.output_dir, "checkpoint-2")
    declared = FillModel(**options).attach(trainer(stack, folder, model=recorded(seed=8)))
    found = [different(trained(declared, saved), wanted)]
    if not stack.startswith("deepspeed"):  # which wants values before it loads
        found.append(different(trained(trainer(stack, folder, model=recorded(seed=8)), saved), wanted))
    return found


def evaluated(stack: str, case: str, folder: Path) -> bool:
    ours = FillModel(**options_of(case, folder)).attach(trainer(stack, folder, model=recorded()))
    other = trainer(stack, folder, model=whole(case, folder))
    return bool(ours.evaluate()["eval_loss"] == other.evaluate()["eval_loss"])


def unfilled(stack: str, case: str, folder: Path) -> str:
    ours = trainer(stack, folder, model=recorded())
    for use in (ours.train, lambda: ours.save_model(str(folder / "unfilled"))):
        with pytest.raises(UninitializedTensorError, match=r"model\.embed_tokens\.weight"):
            use()
        if stack != "one process":  # there the others would wait in save_model
            break
    return "refused"


KINDS = {
    "start": start_and_train,
    "model_init": built_by_model_init,
    "resume": resumed,
    "evaluate": evaluated,
    "unfilled": unfilled,
}
LOADED = {"checkpoint": 21, "missing head": 20, "from scratch": 0}
CASES = [
    *(("start", case) for case in LOADED),
    *((kind, "checkpoint") for kind in ("model_init", "resume", "evaluate", "unfilled")),
]


def run(kind: str, **arguments: Any) -> Any:
    return KINDS[kind](**arguments)


ELSEWHERE = {
    *((stack, "missing head") for stack in ("ddp", "fsdp2", "deepspeed 2", "deepspeed 3")),
    *((stack, "evaluate") for stack in ("fsdp2", "deepspeed 2")),
    *(("deepspeed 2", kind) for kind in ("model_init", "from scratch", "unfilled")),
}
"""The Trainer evaluates under FSDP2 only what it has trained; heads on ranks are with the tests of accelerate."""


def outcomes(ranks: int, stack: str, folder: Path) -> dict[tuple[str, str], list[Any]]:
    cases = [(kind, case) for kind, case in CASES if ELSEWHERE.isdisjoint({(stack, kind), (stack, case)})]
    each = {(kind, case): {"kind": kind, "case": case} for kind, case in cases}
    return run_ranks_each(ranks, run, each, seconds=SECONDS * max(1, ranks / 2), stack=stack, folder=folder)


def test_in_one_process_a_recorded_model_trains_resumes_and_evaluates_as_one_from_from_pretrained(folder: Path) -> None:
    check("one process", 1, folder)


@pytest.mark.parametrize("stack", ["ddp", "fsdp2", "deepspeed 2", "deepspeed 3"])
def test_a_recorded_model_trains_resumes_and_evaluates_as_one_from_from_pretrained(
    stack: str, ranks: int, folder: Path
) -> None:
    check(stack, ranks, folder)


def check(stack: str, ranks: int, folder: Path) -> None:
    resumed_right: list[list[str]] = [[]] if stack.startswith("deepspeed") else [[], []]
    right = {"model_init": [], "resume": resumed_right, "evaluate": True, "unfilled": "refused"}
    for (kind, case), found in outcomes(ranks, stack, folder).items():
        assert found == [[[], LOADED[case]] if kind == "start" else right[kind]] * ranks, (kind, case)
