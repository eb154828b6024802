"""Every tuner of peft, in recorded blocks: the model is the one that plain peft makes of a loaded base, or an error.

Compared are all tensors, what the modules hold in plain attributes, what is trained, and logits. Without ``--whole`` a
sample runs: adapters that are drawn, that are computed from the base, that are taken out of it, and that wrap it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric
from tests.support.ranks import run_ranks
from tests.support.zoo import assert_close, launch, weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.support.peft_tuners import (  # noqa: E402  (imports peft)
    QV,
    TOKENS,
    TUNERS,
    Files,
    llama,
    outcomes,
    random_values_of_plain_pytorch,
    write_files,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own advice

SAMPLE = [
    "LORA",
    "LORA dora",
    "LORA pissa",
    "LORA olora",
    "LORA kasa",
    "LORA modules_to_save, tied",
    "LORA trainable tokens, tied",
    "ADAMSS",
    "CPT",
    "FROD",
    "OSF",
    "PROMPT_TUNING vocab",
    "PSOFT",
    "SHADOW",
    "SUPERTUNING",
    "VERA",
    "XLORA",
]
OTHER_NAMES = {"ADAPTION_PROMPT", "FROD", "FROD all", "SHADOW", "XLORA", "LORA trainable tokens"}
OTHER_NAMES |= {"LORA trainable tokens, tied"}
"""Wrapped so that the error for a checkpoint without adapters has no rename to propose."""
TAKEN_OUT = {"LORA pissa", "LORA pissa dora", "LORA pissa_niter", "LORA olora"}
"""What the load would put back."""
IN_PLACE = {"LORA olora"}
"""Written into a part of the base weights."""
UNDONE = {"LORA kasa"}
"""Truncated base weights, which the load would replace."""
DECIDED = {"ADAMSS", "ADAMSS asa", "ADAMSS dynamic"}
"""Clusters of base weights, found outside torch, which would not be those of the loaded ones."""
SHARDED = ["fsdp2", "deepspeed_stage_3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("peft"))


@pytest.fixture
def names(whole: bool) -> list[str]:
    return list(TUNERS) if whole else SAMPLE


@pytest.fixture
def names_on_ranks(whole: bool) -> list[str]:
    return list(TUNERS) if whole else SAMPLE[::2]


def check(found: dict[str, str], refused: set[str]) -> None:
    wrong = {name: text for name, text in found.items() if text != "equal" and not text.startswith("refused: ")}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    assert {name for name, text in found.items() if text != "equal"} == refused & found.keys()


def test_every_type_of_peft_is_among_the_tuners() -> None:
    types = {name.partition(" ")[0].rstrip(",") for name in TUNERS}
    assert types == {kind.name for kind in peft.PeftType}


@pytest.mark.sweep
def test_what_the_error_proposes_for_one_block_gives_the_model_of_peft(names: list[str], files: Files) -> None:
    check(outcomes("one device", "one block", names, files), OTHER_NAMES | TAKEN_OUT | UNDONE | DECIDED)


@pytest.mark.parametrize("name", sorted(UNDONE | DECIDED))
def test_a_base_that_peft_changes_or_looks_at_needs_two_blocks(name: str, files: Files) -> None:
    one, two = (outcomes("one device", way, [name], files)[name] for way in ("one block", "two blocks"))
    assert "build the model in one init_module block, and change it in another" in one
    assert two == "equal"


@pytest.mark.sweep
@pytest.mark.parametrize("way", ["two blocks", "after"])
def test_on_one_device_the_model_is_that_of_peft(way: str, names: list[str], files: Files) -> None:
    check(outcomes("one device", way, names, files), set())


@pytest.mark.sweep
def test_on_two_ranks_of_ddp_adapters_may_come_after_the_block(names_on_ranks: list[str], files: Files) -> None:
    for found in run_ranks(2, outcomes, strategy="ddp", way="after", names=names_on_ranks, files=files, seconds=300):
        check(found, set())


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", SHARDED)
def test_on_two_ranks_that_shard_the_second_block_gives_the_model_of_peft(
    strategy: str, names_on_ranks: list[str], files: Files
) -> None:
    cases = {"strategy": strategy, "way": "two blocks", "names": names_on_ranks, "files": files}
    for found in run_ranks(2, outcomes, seconds=300, **cases):
        check(found, IN_PLACE)


# -- training ----------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    build: Callable[[], nn.Module]
    wrap: Callable[[nn.Module, Path], Any]
    labels: Tensor


class Trained(NamedTuple):
    losses: list[float]
    loaded: dict[str, Tensor]
    trained: dict[str, Tensor]


def classifier() -> Any:
    config = llama().config
    config.num_labels = 3
    return transformers.LlamaForSequenceClassification(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": QV, "task_type": "CAUSAL_LM", **options})


SAVED: dict[str, tuple[Callable[[], Any], Any]] = {
    "lora": (llama, lora()),
    "dora": (llama, lora(use_dora=True)),
    "a head": (llama, lora(modules_to_save=["lm_head"])),
    "tokens": (llama, lora(trainable_token_indices=[1, 3])),
    "classifier": (classifier, lora(task_type="SEQ_CLS")),
}
"""Adapters that are resumed."""
CLASSES = torch.tensor([0, 2])


def resume(name: str) -> Training:
    build, config = SAVED[name]
    return Training(
        build,
        lambda base, folder: peft.PeftModel.from_pretrained(base, folder / name, is_trainable=True),
        CLASSES if config.task_type == "SEQ_CLS" else TOKENS,
    )


def classify(build: Callable[[], Any], **options: Any) -> Training:
    config = lora(task_type="SEQ_CLS", **options)
    return Training(build, lambda base, folder: peft.get_peft_model(base, config), CLASSES)


TRAININGS = {
    **{f"{name}, resumed": resume(name) for name in SAVED},
    "llama as a classifier": classify(classifier),
    "llama as a classifier, dora": classify(classifier, use_dora=True),
    "bert as a classifier": classify(bert, target_modules=["query", "value"]),
}


def write_adapters(folder: Path) -> Path:
    for build in (llama, classifier, bert):
        torch.manual_seed(7)
        torch.save(build().state_dict(), folder / f"{build.__name__}.pt")
    for name, (make, config) in SAVED.items():
        torch.manual_seed(5)
        model = peft.get_peft_model(make(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
    return folder


def run(model: Any, optimizer: Any, labels: Tensor, fabric: Fabric | None = None) -> Trained:
    loaded, losses = weights(model), []
    model.train()
    for step in range(3):
        loss = model(input_ids=TOKENS + step, labels=labels).loss
        loss.backward() if fabric is None else fabric.backward(loss, model=model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(losses, loaded, weights(model))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5, momentum=0.9)


def on_this_rank(strategy: str, folder: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, (build, wrap, labels) in TRAININGS.items():
        fabric = launch(strategy)
        with random_values_of_plain_pytorch():
            with fabric.init_module(checkpoint=folder / f"{build.__name__}.pt"):
                base = build()
            torch.manual_seed(3)
            with fabric.init_module(empty_init=True):
                model = wrap(base, folder)
            fabric.init_missing(model)
            optimizer: Any = optimizer_of(model)
            model, optimizer = fabric.setup(model, optimizer)
        found[name] = tuple(run(model, optimizer, labels, fabric))  # a type of this file cannot be sent
    return found


@pytest.mark.parametrize("strategy", SHARDED)
def test_resumed_adapters_and_classifiers_train_as_plain_peft_does(strategy: str, tmp_path: Path) -> None:
    folder = write_adapters(tmp_path)
    ranks = run_ranks(2, on_this_rank, strategy=strategy, folder=folder, seconds=150)
    for name, (build, wrap, labels) in TRAININGS.items():
        base = build()
        base.load_state_dict(torch.load(folder / f"{build.__name__}.pt"))
        torch.manual_seed(3)
        model = wrap(base, folder)
        wanted = run(model, optimizer_of(model), labels)
        for found in ranks:
            mine = Trained(*found[name])
            assert_close(mine.loaded, wanted.loaded)
            assert mine.losses == pytest.approx(wanted.losses, abs=1e-5)
            assert_close(mine.trained, wanted.trained, atol=1e-5)
