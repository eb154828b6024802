"""``fabric-init plan``: what it prints, and what its exit status tells a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fabric_init.cli import main as cli
from fabric_init.cli.plan import bytes_a_second, renames, units_named

SOURCE = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 4)
        nn.init.normal_(self.head.weight, std=0.02)

def broken(): return {}["width"]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in ``tiny_to_plan.py``, and a checkpoint of its body."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tiny_to_plan", raising=False)
    (tmp_path / "tiny_to_plan.py").write_text(SOURCE)
    body = nn.Linear(2, 3).state_dict()
    save_file({f"model.body.{name}": value.clone() for name, value in body.items()}, tmp_path / "body.safetensors")
    return tmp_path


def plan(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    return stopped.value.code


BODY = ("tiny_to_plan:Tiny", "body.safetensors")
STRIP = ("--rename", r"^model\.=")


@pytest.mark.usefixtures("here")
def test_what_is_missing_left_over_and_likely_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*BODY) == 1
    text = capsys.readouterr().out
    assert "covers 0 of 4 tensors" in text
    assert "normal_(mean=0, std=0.02) at tiny_to_plan.py:9" in text
    assert "model.body.weight" in text
    assert r'rename={r"^model\.": ""} would match 2 of 4 missing keys' in text
    assert "Not complete" in text
    assert "--no-strict" not in text, "no key matches: that is refused in any case"


@pytest.mark.usefixtures("here")
def test_the_exit_status_tells_whether_the_load_would_go_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*BODY, *STRIP) == 1, "the head is missing"
    assert "With --no-strict it would go through" in capsys.readouterr().out
    assert plan(*BODY, *STRIP, "--no-strict") == 0
    assert plan(*BODY, *STRIP, "--reinit", "head.*") == 0
    assert "Initialized afresh, as asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_to_plan:Tiny", "nothing.safetensors"], "nothing.safetensors does not exist"),
        (["tiny_to_plan:Large", "body.safetensors"], "Large"),
        (["tiny_to_plan:Tiny"], "no checkpoint given; its path goes after tiny_to_plan:Tiny"),
        ([*BODY, "--reinit", "neck.*"], "names no tensor of the model"),
        ([*BODY, "--strategy", "fsdp2", "--precision", "64-true"], "does not do precision='64-true'"),
        ([*BODY, "--strategy", "fsdp3"], "fsdp3"),
        ([*BODY, "--bandwidth", "fast"], "for --bandwidth: 'fast': give a number with its unit"),
        ([*BODY, "--bandwidth", "-2GB/s"], "for --bandwidth: '-2GB/s': give a number with its unit"),
        ([*BODY, "--rename", "model"], "for --rename: 'model': give PATTERN=REPLACEMENT"),
        (["tiny_to_plan:broken", "body.safetensors"], "tiny_to_plan:broken does not build: KeyError: 'width'"),
        ([*BODY, "--devices", "0"], "--devices"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_wrong_call_is_told_apart_from_a_load_that_is_not_complete(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    written = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in written


@pytest.mark.usefixtures("here")
def test_ranks_memory_and_time_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--strategy", "fsdp2", "--devices", "2", "--nodes", "2", "--bandwidth", "1kB/s", "--units", "Linear"]
    assert plan(*BODY, *STRIP, "--no-strict", *options) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Reading: fsdp2, 4 ranks on 2 machines" in lines
    assert "0 to 2, each 12 bytes" in lines
    assert "3 0 bytes" in lines
    assert "from storage 36 bytes" in lines
    assert any(line.startswith("takes 0.0 s with 1.0 kB/s for each rank") for line in lines)
    assert any(line.startswith("optimizer states") for line in lines)


@pytest.mark.usefixtures("here")
def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*BODY, "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["complete"] is False
    assert [one["name"] for one in data["coverage"]["missing"]] == [
        "body.weight",
        "body.bias",
        "head.weight",
        "head.bias",
    ]
    assert data["setting"]["strategy"] == "single_device"


def test_a_folder_is_model_and_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    state = {name: value.to(torch.bfloat16) for name, value in LlamaForCausalLM(config).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert plan(str(tmp_path), "--strategy", "deepspeed_stage_3", "--devices", "2", "--precision", "bf16-true") == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM from" in text
    assert "(100.0% of the bytes)" in text
    assert "the optimizer's copy of them" in text


def test_a_pipe_gets_every_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({f"layers.{number}.weight": torch.zeros(1) for number in range(50)}, here / "many.safetensors")
    assert plan("tiny_to_plan:Tiny", "many.safetensors") == 1
    assert capsys.readouterr().out.count("layers.") == 50


def test_bandwidth_is_read_as_people_write_it() -> None:
    assert bytes_a_second("2GB/s") == 2e9
    assert bytes_a_second("1.5 MiB/s") == 1.5 * 2**20
    assert bytes_a_second("25Gbit/s") == bytes_a_second("25Gbps") == 25e9 / 8
    for wrong in ("2", "GB/s", "0GB/s", "2 parsecs"):
        with pytest.raises(typer.BadParameter):
            bytes_a_second(wrong)


def test_units_and_renames_are_read_as_people_write_them() -> None:
    assert units_named("blocks") == "blocks"
    assert units_named("1000000") == 1_000_000
    chosen = units_named("Linear,LayerNorm")
    assert callable(chosen)
    assert [chosen(module) for module in (nn.Linear(1, 1), nn.LayerNorm(1), nn.ReLU())] == [True, True, False]
    assert renames([]) is None
    assert renames([r"^model\.=", "gamma$=weight=1"]) == {r"^model\.": "", "gamma$": "weight=1"}
