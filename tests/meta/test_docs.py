"""Every Python block of the documentation runs, and so do the examples; the site builds without a warning.

The blocks of one file run in order and share their names. An HTML comment right above a block says what is special:

    <!-- raises: ErrorName -->   the block ends in that error
    <!-- from: examples/x.py -->  the block is a part of that file, word for word, and runs with it
    <!-- not run: needs … -->    the block cannot run here
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fabric_init
from tests.support.ranks import environment_of_a_rank, try_ranks

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
EXAMPLES = sorted(example.name for example in ROOT.glob("examples/*.py"))

_BLOCK = re.compile(r"^(?:<!-- (?P<mark>.+?) -->\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    line: int  # of its first line of code
    code: str
    raises: str | None = None
    part_of: str | None = None  # a file, by its path from the root
    run: bool = True


def blocks_of(text: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        kind, _, detail = (match["mark"] or "").partition(": ")
        assert kind in ("", "raises", "from", "not run"), f"unknown mark above a block: {match['mark']}"
        line = text.count("\n", 0, match.start("code")) + 1
        raises, part_of = (detail if kind == one else None for one in ("raises", "from"))
        yield Block(line, match["code"], raises, part_of, run=kind in ("", "raises"))


def run(block: Block, page: str, names: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")  # tracebacks name the page's line
    if block.raises is None:
        exec(code, names)
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the block names it)
        exec(code, names)
    assert type(caught.value).__name__ == block.raises, f"{page}:{block.line} raised {caught.value!r}"


@pytest.fixture
def names_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README takes for granted: a model, a config, and the checkpoints that it names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    llama = tmp_path / "Llama-3.2-1B"
    llama.mkdir()
    save_file(LlamaForCausalLM(config).state_dict(), llama / "model.safetensors")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    save_file(Model().state_dict(), tmp_path / "model.safetensors")
    return {
        "__name__": "documentation",
        "LlamaForCausalLM": LlamaForCausalLM,
        "Model": Model,
        "config": config,
        "fabric_init": fabric_init,
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, names_of_a_reader: dict[str, Any]) -> None:
    blocks = list(blocks_of((ROOT / page).read_text(encoding="utf-8")))
    state = torch.get_rng_state()
    try:
        for block in blocks:
            if block.run:
                run(block, page, names_of_a_reader)
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("page", PAGES)
def test_a_block_from_a_file_is_in_it_word_for_word(page: str) -> None:
    for block in blocks_of((ROOT / page).read_text(encoding="utf-8")):
        if block.part_of is not None:
            lines = [line.strip() for line in (ROOT / block.part_of).read_text(encoding="utf-8").splitlines()]
            wanted = [line.strip() for line in block.code.splitlines()]  # the page may indent it otherwise
            found = any(lines[start : start + len(wanted)] == wanted for start in range(len(lines)))
            assert found, f"{page}:{block.line} is not in {block.part_of}"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes_the_pattern(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(?:```|~~~) *(?:python|py)\b", text, re.MULTILINE)) == len(list(blocks_of(text)))


def test_a_failing_block_fails_and_names_its_line() -> None:
    page = "Text.\n\n```python\nvalue = 1\nvalue.missing\n```\n"
    (block,) = blocks_of(page)
    with pytest.raises(AttributeError) as caught:
        run(block, "page.md", {})
    assert caught.traceback[-1].lineno + 1 == 5
    assert Path(caught.traceback[-1].path) == ROOT / "page.md"


@pytest.mark.parametrize("code", ["pass", "raise TypeError"])
def test_a_block_that_does_not_end_in_its_error_fails(code: str) -> None:
    (block,) = blocks_of(f"<!-- raises: KeyError -->\n```python\n{code}\n```\n")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(block, "page.md", {})


def test_a_block_that_cannot_run_says_what_it_needs() -> None:
    (block,) = blocks_of("<!-- not run: needs a GPU -->\n```python\nraise TypeError\n```\n")
    assert not block.run


ON_TWO_RANKS = ["--accelerator=cpu", "--devices=2"]
COMMANDS = {
    "from_scratch_fsdp2.py": [*ON_TWO_RANKS, "--width=32", "--depth=2", "--steps=2"],
    "lora_fsdp2.py": [*ON_TWO_RANKS, "--demo", "--dora", "--steps=2"],
    "qlora.py": ["--demo", "--steps=1"],
    "new_head_ddp.py": [*ON_TWO_RANKS, "--steps=2"],
    "trl_sft.py": ["--demo"],
    "trainer.py": [*ON_TWO_RANKS, "--strategy=fsdp2"],
    "zero3.py": [*ON_TWO_RANKS, "--demo", "--steps=2"],
}
"""How the tests start an example, where it takes options."""


Run = Callable[..., str]
"""Runs an example, with these arguments, in this folder; returns what it prints."""


@pytest.fixture
def run_example(whole: bool) -> Run:
    """Start examples as their readers do, if all sweeps run; otherwise fork them, as torchrun would start them."""
    return by_command if whole else by_fork


def by_command(example: str, arguments: list[str], folder: Path, seconds: float = 300.0) -> str:
    """DeepSpeed compiles an operator at its first start: killed then, it leaves a lock for ever."""
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    # on a busy machine torch's threads mostly wait for each other
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=alone, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the other ranks, should they hang
        process.wait()
    assert process.returncode == 0, output
    return output


def by_fork(example: str, arguments: list[str], folder: Path, seconds: float = 300.0) -> str:
    ranks = 2 if "--devices=2" in arguments else 1
    script = ROOT / "examples" / example
    outcomes = try_ranks(ranks, as_main, script=script, arguments=arguments, folder=folder, seconds=seconds)
    assert not any(one.error for one in outcomes), "\n".join(one.error + one.output for one in outcomes)
    return outcomes[0].output


def as_main(script: Path, arguments: list[str], folder: Path) -> None:
    if os.environ["WORLD_SIZE"] == "1":  # nobody has launched it
        for name in environment_of_a_rank(0, 1, 0):
            del os.environ[name]
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


ON_THEIR_OWN = {"any_strategy.py", "finetune_fsdp2.py", "from_zero_init.py"}
"""Examples with tests of their own."""
FROM_SCRATCH = {"from_scratch_fsdp2.py", "torchtitan_style.py"}
"""Examples that load nothing."""


@pytest.mark.sweep
@pytest.mark.parametrize("example", [example for example in EXAMPLES if example not in ON_THEIR_OWN])
def test_example_runs(example: str, run_example: Run, tmp_path: Path) -> None:
    output = run_example(example, COMMANDS.get(example, []), tmp_path)
    assert "initialized" in output
    assert ("loaded" in output) == (example not in FROM_SCRATCH)


def test_an_example_starts_its_ranks_by_itself(tmp_path: Path) -> None:
    arguments = [*ON_TWO_RANKS, "--strategy=ddp", "--steps=1"]
    assert "8 loaded" in by_command("any_strategy.py", arguments, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", ["fsdp", "model_parallel"])  # those that no other example shows
def test_one_script_trains_on_every_strategy(strategy: str, run_example: Run, tmp_path: Path) -> None:
    output = run_example("any_strategy.py", [*ON_TWO_RANKS, f"--strategy={strategy}", "--steps=2"], tmp_path)
    assert "8 loaded" in output
    assert "step 1  loss " in output


@pytest.mark.sweep
def test_zero_init_loses_what_a_constructor_writes_and_a_recording_keeps_it(run_example: Run, tmp_path: Path) -> None:
    output = run_example("from_zero_init.py", [], tmp_path)
    std = {name: float(value) for name, value in re.findall(r"^(\S+) +std of head.weight (\S+)$", output, re.MULTILINE)}
    assert std["fabric_init"] == pytest.approx(0.001, rel=0.3)
    assert std["zero.Init"] > 0.03, "DeepSpeed has fixed this: say so in docs/coming_from/deepspeed.md"


@pytest.mark.sweep
def test_adapters_learn_on_a_quantized_base(run_example: Run, tmp_path: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\S+)$", run_example("qlora.py", ["--demo"], tmp_path), re.M)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.sweep
def test_the_finetuning_recipe_goes_on_where_it_stopped(run_example: Run, tmp_path: Path) -> None:
    first = run_example("finetune_fsdp2.py", [*ON_TWO_RANKS, "--demo", "--steps=2"], tmp_path)
    assert "21 loaded" in first
    resume = first.split()[-1]
    second = run_example("finetune_fsdp2.py", [*ON_TWO_RANKS, "--resume", resume, "--steps=1"], tmp_path)
    assert re.search(r"21 loaded .*\nstep 2  loss ", second), second
