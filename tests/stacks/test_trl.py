"""TRL's ``SFTTrainer`` with peft: adapters over a recorded base train as over one from ``from_pretrained``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fabric_init import FillModel, UninitializedTensorError, deferred_init, init_report
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

pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("trl")


SEED = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hugging_face"))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{f"w{number}": number for number in range(3, 40)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def trainer(stack: str, folder: Path, model: Any, peft_config: Any, *, saving: bool = False) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer

    config = deepspeed_config(int(stack[-1])) if stack.startswith("deepspeed") else None
    STACKS[stack]() if config is None else deepspeed_ranks()
    arguments = SFTConfig(
        output_dir=str(folder / stack),
        use_cpu=config is None,
        deepspeed=config,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps" if saving else "no",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        accelerator_config={"use_configured_state": True},
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = [[3 + (i * j) % 37 for j in range(8)] for i in range(16)]
    torch.manual_seed(SEED)  # peft draws the adapters
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def trained(one: Any, resume: str | None = None) -> dict[str, Tensor]:
    torch.manual_seed(SEED)  # the order of the data is drawn next
    one.train(resume_from_checkpoint=resume)
    return gathered(one.model)


def start_train_and_resume(stack: str, case: str, adapters: dict[str, Any], folder: Path) -> dict[str, object]:
    """Return what differs from TRL's own way after three steps, and when two steps of them were saved."""
    options = options_of(case, folder)
    made = trainer(stack, folder, recorded(case), lora(**adapters), saving=True)
    with reading_its_part(stack, case, folder):
        ours = FillModel(**options).attach(made)
        found = trained(ours)
    wanted = trained(trainer(stack, folder, whole(case, folder), lora(**adapters)))
    saved = os.path.join(ours.args.output_dir, "checkpoint-2")
    again = FillModel(**options).attach(trainer(stack, folder, recorded(case), lora(**adapters)))
    return {
        "weights": different(found, wanted),
        "resumed": different(trained(again, saved), wanted),
        "trained": any(name.endswith("lora_B.default.weight") and t.any() for name, t in found.items()),
        "loaded": sum(row.status == "loaded" for row in init_report(ours.model).rows),
    }


def in_a_block(stack: str, case: str, adapters: dict[str, Any], folder: Path) -> list[str]:
    """Return what differs when peft makes adapters in a recorded block: those that are computed from the base, too."""
    from peft import get_peft_model

    base = recorded(case, rng="eager")
    torch.manual_seed(SEED)
    with deferred_init(rng="eager"):
        model = get_peft_model(base, lora(**adapters))
    ours = FillModel(**options_of(case, folder)).attach(trainer(stack, folder, model, None))
    found, theirs = trained(ours), whole(case, folder)
    torch.manual_seed(SEED)
    theirs = get_peft_model(theirs, lora(**adapters))
    return different(found, trained(trainer(stack, folder, theirs, None)))


def refused(stack: str, case: str, adapters: dict[str, Any], folder: Path) -> str:
    """Adapters that are computed from a base without values, and a base that nobody fills."""
    with pytest.raises(UninitializedTensorError):
        trainer(stack, folder, recorded(), lora(use_dora=True))
    with pytest.raises(UninitializedTensorError, match=r"model\.embed_tokens\.weight"):
        trainer(stack, folder, recorded(), lora()).train()
    return "refused"


KINDS = {"start": start_train_and_resume, "in a block": in_a_block, "refused": refused}
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("start", "checkpoint"): {},
    ("start", "missing head"): {},
    ("start", "tied"): {},
    ("start", "from scratch"): {},
    ("start", "checkpoint, and the head is trained"): {"modules_to_save": ["lm_head"]},
    ("in a block", "checkpoint"): {},
    ("in a block", "checkpoint, DoRA"): {"use_dora": True},
    ("refused", "checkpoint"): {},
}
LOADED = {"checkpoint": 21, "missing head": 20, "tied": 20, "from scratch": 0}


def run(kind: str, **arguments: Any) -> Any:
    return KINDS[kind](**arguments)


ON_RANKS = {("start", "checkpoint"), ("start", "tied"), ("in a block", "checkpoint, DoRA"), ("refused", "checkpoint")}


def test_in_one_process_adapters_over_a_recorded_base_train_and_resume_as_over_a_loaded_one(folder: Path) -> None:
    check("one process", 1, folder)


@pytest.mark.parametrize("stack", ["fsdp2", "deepspeed 3"])
def test_adapters_over_a_recorded_base_train_and_resume_as_over_a_loaded_one(
    stack: str, ranks: int, folder: Path
) -> None:
    check(stack, ranks, folder)


def check(stack: str, ranks: int, folder: Path) -> None:
    each = {
        (kind, case): {"kind": kind, "case": case.partition(",")[0], "adapters": adapters}
        for (kind, case), adapters in CASES.items()
        if ranks == 1 or (kind, case) in ON_RANKS
    }
    seconds = SECONDS * max(1, ranks / 2)
    for (kind, case), found in run_ranks_each(ranks, run, each, seconds=seconds, stack=stack, folder=folder).items():
        loaded = LOADED[case.partition(",")[0]]
        right = {
            "start": {"weights": [], "resumed": [], "trained": True, "loaded": loaded},
            "in a block": [],
            "refused": "refused",
        }
        assert found == [right[kind]] * ranks, (kind, case)
