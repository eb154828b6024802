"""``fabric-init audit`` as its users meet it: models by name, exit statuses for scripts, JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fabric_init.cli import audit_tables
from fabric_init.cli.main import main

MODELS = """
import torch
from torch import nn
def sound():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for layer in model: nn.init.normal_(layer.weight, std=0.02)
    return model
def t5(std=None):
    from transformers import T5Config, T5ForConditionalGeneration
    config = T5Config(
        d_model=256, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=300,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
    )
    config.tie_word_embeddings = False  # its constructor does not scale, but ties all the same
    model = T5ForConditionalGeneration(config)
    if std is not None: nn.init.normal_(model.lm_head.weight, std=std)
    return model
def fixed_t5(): return t5(256**-0.5)
def vast(): return nn.Linear(1 << 20, 1 << 20)
class Garbage(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4))
def undone():
    layer = nn.Linear(4, 4)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(layer.weight, std=0.02)
    return layer
def lightning_module():
    from lightning import LightningModule
    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 5)
            self.example_input_array = torch.randn(4, 8)
        def forward(self, x): return self.layer(x)
    return Lit()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_to_audit.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, "models_to_audit", raising=False)
    return tmp_path


def status_of(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", *arguments])
    return stopped.value.code


@pytest.mark.parametrize(
    ("model", "fail_on", "status"),
    [
        ("sound", "error", 0),
        ("sound", "warning", 0),
        ("sound", "note", 1),
        ("undone", "error", 0),
        ("undone", "warning", 1),
        ("Garbage", "error", 1),
        ("Garbage", "never", 0),
    ],
)
def test_the_exit_status_follows_the_worst_finding(model: str, fail_on: str, status: int) -> None:
    assert status_of(f"models_to_audit:{model}", "--no-batch", "--fail-on", fail_on) == status


def test_a_table_has_the_tensors_and_the_findings_come_last(capsys: pytest.CaptureFixture[str]) -> None:
    status_of("models_to_audit:undone", "--no-batch")
    shown = capsys.readouterr().out
    assert "normal_(mean=0, std=0.02)" in shown
    assert "models_to_audit.py:27" in shown
    table, warning = shown.index("What each tensor gets"), shown.index("warning [two-rules] weight")
    assert table < warning < shown.index("Linear: 2 tensors, 1 warning")


def test_a_narrow_terminal_has_rules_and_lines_whole_below_the_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_tables, "out", lambda: Console(file=sys.stdout, width=80, markup=False))
    status_of("models_to_audit:undone", "--no-batch")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("weight"))
    assert lines[start].split()[1:] == ["4×4", "0", "0.02", "3×"]
    assert lines[start + 1 : start + 3] == ["normal_(mean=0, std=0.02)", "models_to_audit.py:27"]
    assert max(map(len, lines)) <= 80


def test_json_is_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    status_of("models_to_audit:Garbage", "--no-batch", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["worst"]) == ("Garbage", "error")
    assert report["findings"][0]["tensors"] == ["weight"]


def test_rows_limits_the_table_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status_of("models_to_audit:sound", "--no-batch", "--rows", "1", "--fail-on", "never")
    shown = capsys.readouterr().out
    assert "0.weight" in shown
    assert "and 3 more" in shown


def test_t5s_untied_head_comes_first_with_both_losses_and_its_fixed_twin_is_fine(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert status_of("models_to_audit:t5", "--json", "--html", "t5.html") == 1
    report = json.loads(capsys.readouterr().out)
    first = report["findings"][0]
    assert (first["level"], first["tensors"]) == ("error", ["lm_head.weight"])
    assert first["std"] == pytest.approx(256**-0.5, rel=0.1)
    ideal = math.log(300)
    assert first["loss_after"] == pytest.approx(ideal, rel=0.1)
    assert first["loss_before"] > 2 * ideal
    assert "lm_head.weight" in (here / "t5.html").read_text(encoding="utf-8")
    assert status_of("models_to_audit:fixed_t5", "--fail-on", "warning") == 0
    capsys.readouterr()
    for seed, alike in (("0", True), ("1", False)):
        status_of("models_to_audit:t5", "--json", "--seed", seed)
        assert (json.loads(capsys.readouterr().out)["first_loss"] == report["first_loss"]) is alike


def test_a_model_that_does_not_say_what_it_takes_is_audited_without_a_batch_unless_one_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of("models_to_audit:sound") == 0
    written = capsys.readouterr()
    assert "fabric-init audit: not run: no batch can be generated" in written.err
    assert "4 tensors" in written.out
    assert status_of("models_to_audit:sound", "--batch") == 1
    assert "no batch can be generated" in capsys.readouterr().err


def test_a_lightning_module_is_run_on_the_example_that_its_constructor_makes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of("models_to_audit:lightning_module", "--batch", "--json") == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["activation_var"] > 0


def test_a_model_beyond_this_machines_memory_is_audited_but_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("models_to_audit:vast") == 0
    written = capsys.readouterr()
    assert "not run: weights and gradients take 8.8 TB" in written.err
    assert "1048576×1048576" in written.out


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("models_to_audit:sound", "--html", "page.pdf") == 1
    assert "the file name must end in .html" in capsys.readouterr().err
    assert status_of("models_to_audit:absent", "--html", "nowhere/page.html") == 1
    assert capsys.readouterr().err == "fabric-init audit: --html nowhere/page.html: there is no folder nowhere\n"


def test_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("models_to_audit:absent") == 1
    assert (
        capsys.readouterr().err
        == "fabric-init audit: models_to_audit:absent: models_to_audit has no attribute 'absent'\n"
    )


def test_as_a_process_it_finds_models_in_the_working_folder_and_writes_no_color_codes_to_a_pipe(here: Path) -> None:
    command = [sys.executable, "-m", "fabric_init", "audit", "models_to_audit:Garbage", "--no-batch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 1, done.stderr
    assert "error [never-written] weight" in done.stdout
    assert "\x1b" not in done.stdout
