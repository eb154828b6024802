from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fabric_init.cli.main import main


def answer(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str, str]:
    """Exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *map(str, arguments)])
    written = capsys.readouterr()
    return stopped.value.code, written.out, written.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of eight layers."""
    state = {f"layers.{number}.weight": torch.full((3, 2), float(number)) for number in range(8)}
    state["head.bias"] = torch.arange(4).bfloat16()
    names = {key: f"model-{1 + number // 5:05d}-of-00002.safetensors" for number, key in enumerate(state)}
    for name in sorted(set(names.values())):
        save_file({key: value for key, value in state.items() if names[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_layers_are_folded_into_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = answer([model], capsys)
    assert (status, err) == (0, "")
    lines = lines_of(out)
    assert ["layers.{0..7}.weight", "8", "×", "3×2", "float32", "192", "bytes"] in lines
    assert ["head.bias", "4", "bfloat16", "8", "bytes"] in lines
    assert "sharded safetensors, 3 files" in out
    assert lines[-1] == ["sound"]


def test_all_has_a_line_for_each_tensor_and_each_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = answer([model, "--all"], capsys)
    lines = lines_of(out)
    for number in range(8):
        name = f"model-{1 + number // 5:05d}-of-00002.safetensors"
        assert [f"layers.{number}.weight", "3×2", "float32", "24", "bytes", name] in lines
    assert [line[0] for line in lines if "bytes" in line and line[0].startswith("model-")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_globs_choose_tensors(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = answer([model, "*.bias", "layers.[12].*"], capsys)
    assert "layers.{1..2}.weight" in out
    assert "head.bias" in out


def test_globs_that_match_nothing_are_an_error_that_names_them(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = answer([model, "*.gamma", "tail.*"], capsys)
    assert (status, out) == (1, "")
    assert "has no tensor whose name matches *.gamma or tail.*" in err


def test_values_of_folded_layers_are_those_of_all_their_elements(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = answer([model, "--values"], capsys)
    (line,) = [line for line in lines_of(out) if line[0].startswith("layers")]
    assert line[-4:] == ["0", "7", "3.5", f"{torch.arange(8.0).std(correction=0):.4g}"]


def test_damage_is_status_1_and_named_with_what_it_hits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size - 30
    os.truncate(shard, size)
    status, out, err = answer([model], capsys)
    assert (status, err) == (1, "")
    assert "not sound: 1 fault" in out
    (line,) = [line for line in out.splitlines() if line.startswith("truncated")]
    assert "model-00001-of-00002.safetensors" in line
    assert f"ends at byte {size:,}" in line
    assert "layers.{3..4}.weight" in line


def test_json_is_everything_and_nothing_else(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = answer([model, "--json", "--values"], capsys)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["sound"] is True
    assert len(found["tensors"]) == 9
    assert found["tensors"][1]["values"]["mean"] == 1
    assert found["tensors"][0]["files"] == ["model-00001-of-00002.safetensors"]
    (model / "model-00002-of-00002.safetensors").unlink()
    status, out, _ = answer([model, "--json"], capsys)
    assert status == 1
    assert json.loads(out)["damage"][0]["kind"] == "missing file"


def test_nan_is_json_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.full((2,), float("nan"))}, tmp_path / "m.safetensors")
    status, out, _ = answer([tmp_path, "--json", "--values"], capsys)
    assert status == 1
    assert json.loads(out)["tensors"][0]["values"]["mean"] == "nan"


@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_what_cannot_be_read_is_one_line(
    json_: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.safetensors").write_text("<html>Not found</html>")
    status, out, err = answer([tmp_path / "page.safetensors", *json_], capsys)
    assert (status, out) == (1, "")
    assert err.startswith("fabric-init inspect: ")
    assert "an HTML or XML page" in err
    assert err.count("\n") == 1


def test_entries_and_ties_of_a_training_checkpoint_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.ones(2)
    nets = {"generator": {"a": weight, "b": weight}, "critic": {"w": torch.zeros(4)}}
    torch.save(nets, tmp_path / "gan.pt")
    _, out, _ = answer([tmp_path], capsys)
    assert "state dicts, and their tensors: generator (2), critic (1)" in out
    assert "generator.a = generator.b" in out
    _, out, _ = answer([tmp_path, "--entry", "critic"], capsys)
    assert "1 tensor, 4 elements, 16 bytes: float32" in out


def test_keys_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"evil\x1b[2J[red]": torch.ones(1)}, tmp_path / "m.safetensors")
    _, out, _ = answer([tmp_path], capsys)
    assert "evil\\x1b[2J[red]" in out
    assert "\x1b" not in out


def test_a_manifest_is_compared_with(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "sums").write_text(f"{'0' * 64}  model-00001-of-00002.safetensors\n")
    status, out, _ = answer([model, "--manifest", model / "sums"], capsys)
    assert status == 1
    assert "digest" in out


def test_the_shell_completes_a_path_as_it_does_others(tmp_path: Path) -> None:
    """The command offers nothing of its own, and the script tells bash to offer files then."""
    script = Path(sys.executable).with_name("fabric-init")
    asked = {**os.environ, "_FABRIC_INIT_COMPLETE": "complete_bash", "COMP_WORDS": "fabric-init inspect mod"}
    found = subprocess.run([str(script)], env={**asked, "COMP_CWORD": "2"}, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == ""
    source = subprocess.run(
        [str(script)], env={**os.environ, "_FABRIC_INIT_COMPLETE": "source_bash"}, capture_output=True, check=False
    )
    assert b"-o default" in source.stdout
