"""Real files, really damaged: what is wrong is named, and so is what is sound in them all the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fabric_init.checkpoints import open_checkpoint, write_manifest
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from fabric_init.tools.inspect import CheckpointContents, inspect
from tests.fuzz.pristine import STATE, dcp, safetensors_index, torch_index, torch_legacy, torch_zip
from tests.support.dcp_writers import save_alone
from tests.support.deepspeed_saves import Model

LETTERS = {letter: torch.full((4,), float(number)) for number, letter in enumerate("abcd")}


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    path = tmp_path / "letters.safetensors"
    save_file(LETTERS, path)
    return path


def kinds(contents: CheckpointContents) -> list[str]:
    return [one.kind for one in contents.damage]


def whole(contents: CheckpointContents) -> str:
    return "".join(sorted(row.key for row in contents.tensors if row.whole))


def test_the_text_of_contents_is_one_line_and_one_for_each_fault(letters: Path) -> None:
    assert str(inspect(letters)) == f"{letters}: safetensors, 4 tensors: 64 bytes of float32\nsound"
    os.truncate(letters, letters.stat().st_size - 4)
    head, fault = str(inspect(letters)).splitlines()
    assert head.startswith(str(letters))
    assert fault.startswith("truncated: letters.safetensors: ends at byte ")


def with_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Write a safetensors file anew with another header over the same data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_a_sound_file_has_no_damage(letters: Path) -> None:
    contents = inspect(letters, values=True)
    assert contents.sound
    assert whole(contents) == "abcd"


def test_of_a_truncated_file_the_tensors_before_the_cut_are_whole_and_counted(letters: Path) -> None:
    os.truncate(letters, letters.stat().st_size - 24)
    contents = inspect(letters, values=True)
    (damage,) = contents.damage
    assert (damage.kind, damage.file, damage.tensors) == ("truncated", letters.name, ("c", "d"))
    assert "24 too early: 1 tensor beyond its end, 1 in part" in damage.message
    assert whole(contents) == "ab"
    assert [row.key for row in contents.tensors if row.values is not None] == ["a", "b"]
    with pytest.raises(CheckpointFormatError):
        open_checkpoint(letters)


def test_trailing_bytes_are_counted(letters: Path) -> None:
    size = letters.stat().st_size
    with letters.open("ab") as file:
        file.write(b"more")
    (damage,) = inspect(letters).damage
    assert damage.kind == "trailing bytes"
    assert damage.message == f"4 bytes after the last tensor, from {size:,} on"


def test_tensors_that_overlap_and_the_gap_that_comes_of_it_are_named(letters: Path) -> None:
    with_header(letters, lambda header: header["b"].update(data_offsets=[8, 24]))
    contents = inspect(letters)
    assert [(one.kind, one.tensors) for one in contents.damage] == [("overlap", ("a", "b")), ("gap", ())]


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"shape": [5]}, "wrong size", "20 bytes by shape and dtype, and 16 by its offsets"),
        ({"dtype": "F4", "shape": [32]}, "unknown dtype", "F4"),
        ({"shape": [-4]}, "unreadable", "makes no sense"),
        ({"data_offsets": [32, 16]}, "unreadable", "makes no sense"),
        ({"dtype": None}, "unreadable", "makes no sense"),
    ],
)
def test_an_impossible_entry_is_named_and_the_others_are_shown(
    letters: Path, change: dict[str, object], kind: str, said: str
) -> None:
    with_header(letters, lambda header: header["b"].update(change))
    contents = inspect(letters)
    assert contents.damage[0].kind == kind
    assert said in contents.damage[0].message
    assert contents.damage[0].tensors == ("b",)
    assert set("acd") <= {row.key for row in contents.tensors}


def test_a_key_given_twice_is_named(tmp_path: Path) -> None:
    entry = '"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert [(one.kind, one.tensors) for one in inspect(tmp_path).damage] == [("listed twice", ("w",))]


@pytest.mark.parametrize("size", [3, 100])
def test_a_file_cut_within_its_header_is_one_error(letters: Path, size: int) -> None:
    os.truncate(letters, size)
    with pytest.raises(CheckpointFormatError, match="ends within its header"):
        inspect(letters)


def test_nan_and_infinities_are_counted_where_they_are(tmp_path: Path) -> None:
    state = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan"), float("inf"), float("nan"), 3.0])}
    save_file(state, tmp_path / "m.safetensors")
    assert inspect(tmp_path).sound
    contents = inspect(tmp_path, values=True)
    assert [(one.kind, one.tensors, one.message) for one in contents.damage] == [
        ("NaN", ("bad",), "2 elements of 5 NaN"),
        ("Inf", ("bad",), "1 element of 5 infinite"),
    ]
    (values,) = (row.values for row in contents.tensors if row.key == "bad")
    assert values is not None
    assert (values.min, values.max, values.mean, values.std) == (1, 3, 2, 1)


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("write", "suffix"), [(safetensors_index, "safetensors"), (torch_index, "bin")])
def test_a_missing_shard_is_named_with_its_tensors(write: Callable[[Path], str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / write(tmp_path)
    (tmp_path / f"two.{suffix}").unlink()
    contents = inspect(path)
    (damage,) = contents.damage
    assert (damage.kind, damage.file) == ("missing file", f"two.{suffix}")
    assert damage.tensors == ("layers.1.weight", "n", "nothing")
    assert [row.key for row in contents.tensors] == ["layers.0.weight", "layers.0.bias"]
    assert [file.nbytes for file in contents.files if file.name.startswith("two")] == [None]


def test_index_and_shards_that_disagree_are_told_both_ways(tmp_path: Path) -> None:
    safetensors_index(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["n"]
    content["weight_map"]["gone"] = "one.safetensors"
    index.write_text(json.dumps(content))
    found = [(one.kind, one.file, one.tensors) for one in inspect(tmp_path).damage]
    assert found == [
        ("missing tensor", "one.safetensors", ("gone",)),
        ("not in the index", "two.safetensors", ("n",)),
    ]


def test_a_truncated_and_an_unreadable_shard_leave_the_others_as_they_are(tmp_path: Path) -> None:
    safetensors_index(tmp_path)
    os.truncate(tmp_path / "one.safetensors", 160)
    (tmp_path / "two.safetensors").write_bytes(b"<html>Not found</html>")
    contents = inspect(tmp_path, values=True)
    assert sorted(kinds(contents)) == ["truncated", "unreadable"]
    assert {row.key for row in contents.tensors} == {"layers.0.weight", "layers.0.bias"}


def numbered(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        save_file({f"layers.{number}.weight": torch.ones(2)}, folder / name)


def test_a_shard_that_the_index_does_not_name_is_seen_by_its_number(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    numbered(tmp_path, names[0], names[1])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layers.0.weight": names[0]}}))
    found = [(one.kind, one.file) for one in inspect(tmp_path).damage]
    assert found == [("not in the index", names[1]), ("missing file", names[2])]


def test_shards_without_their_index_are_shown_all_the_same(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    numbered(tmp_path, names[0], names[2])
    contents = inspect(tmp_path)
    assert [row.key for row in contents.tensors] == ["layers.0.weight", "layers.1.weight"]
    assert [(one.kind, one.file) for one in contents.damage] == [
        ("missing file", "model.safetensors.index.json"),
        ("missing file", names[1]),
    ]


def test_unrelated_files_in_one_folder_are_not_guessed_at(tmp_path: Path) -> None:
    numbered(tmp_path, "one.safetensors", "two.safetensors")
    with pytest.raises(CheckpointFormatError, match="2 files that could be meant"):
        inspect(tmp_path)


# -- files of torch.save -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_a_truncated_torch_file_keeps_what_lies_before_the_cut(write: Callable[[Path], str], tmp_path: Path) -> None:
    path = tmp_path / write(tmp_path)
    size = path.stat().st_size
    counts = []
    for cut in range(size, size // 3, -37):
        os.truncate(path, cut)
        try:
            contents = inspect(path, values=True)
        except CheckpointError:
            break  # within the pickle
        assert contents.sound == (cut == size)
        assert len(contents.tensors) == len(STATE) + 3
        for row in contents.tensors:
            if row.whole and row.key in STATE and row.values is not None and row.numel:
                assert row.values.max == STATE[row.key].max().item()
        counts.append(sum(row.whole for row in contents.tensors))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(STATE) + 3
    assert len(set(counts)) > 3
    assert counts[-1] < 3


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
@pytest.mark.parametrize("extra", [1, 100_000])
def test_bytes_behind_a_torch_file_are_counted(write: Callable[[Path], str], extra: int, tmp_path: Path) -> None:
    path = tmp_path / write(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(extra))
    contents = inspect(path)
    (damage,) = contents.damage
    assert damage.kind == "trailing bytes"
    assert damage.message.startswith(f"{extra:,} bytes after the ")
    assert all(row.whole for row in contents.tensors)


def test_a_storage_that_a_zip_file_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / torch_zip(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"model/data/2", b"model/data/z"))
    contents = inspect(path)
    (damage,) = contents.damage
    assert damage.kind == "wrong size"
    assert damage.message == "storage 2 is missing"
    assert damage.tensors == ("layers.1.weight",)


def test_code_in_a_pickle_is_one_error_and_is_not_run(tmp_path: Path, harmful: object, marker: Path) -> None:
    torch.save({"w": torch.ones(2), "x": harmful}, tmp_path / "m.pt")
    with pytest.raises(CheckpointFormatError, match="could run code"):
        inspect(tmp_path / "m.pt")
    assert not marker.exists()


def test_a_tensor_without_values_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2, device="meta"), "c": torch.ones(2)}, tmp_path / "m.pt")
    contents = inspect(tmp_path)
    (damage,) = contents.damage
    assert (damage.kind, damage.tensors) == ("unreadable", ("b",))
    assert "before it had values" in damage.message
    assert whole(contents) == "ac"


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_truncated_file_of_dcp_leaves_what_lies_before_the_cut(tmp_path: Path) -> None:
    dcp(tmp_path)
    assert inspect(tmp_path).sound
    os.truncate(tmp_path / "__0_0.distcp", 4000)
    contents = inspect(tmp_path, values=True)
    (damage,) = contents.damage
    assert damage.kind == "truncated"
    assert set(damage.tensors) == {row.key for row in contents.tensors if not row.whole and row.numel}
    counted = {row.key: row.values.max for row in contents.tensors if row.values is not None}
    assert counted == {key: STATE[key].max().item() for key in counted}
    assert counted


def test_files_of_dcp_that_are_missing_or_too_long_are_named(tmp_path: Path) -> None:
    save_alone({"model": STATE}, tmp_path, single_file_per_rank=False)
    files = sorted(tmp_path.glob("*.distcp"))
    files[0].unlink()
    with files[1].open("ab") as file:
        file.write(b"more")
    contents = inspect(tmp_path)
    assert {(one.kind, one.file) for one in contents.damage} == {
        ("missing file", files[0].name),
        ("trailing bytes", files[1].name),
    }


def test_damage_within_a_file_of_dcp_shows_when_values_are_read(tmp_path: Path) -> None:
    dcp(tmp_path)
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes().replace(b"PK\5\6", b"XX\5\6"))
    assert inspect(tmp_path).sound
    contents = inspect(tmp_path, values=True)
    assert set(kinds(contents)) == {"unreadable"}
    assert [one.tensors for one in contents.damage] == [(row.key,) for row in contents.tensors if row.numel]


@pytest.fixture(scope="module")
def zero_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of ZeRO-2 save, written down as DeepSpeed does, without running it."""
    folder = tmp_path_factory.mktemp("zero2") / "step1"
    folder.mkdir()
    state = {name: value.detach().bfloat16() for name, value in Model().named_parameters()}
    numel = sum(value.numel() for value in state.values())
    length = -(-numel // 4) * 2
    shapes = {name: value.shape for name, value in state.items()}
    torch.save({"module": state, "param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")
    for rank in range(2):
        part = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [torch.ones(length)]}
        torch.save({"optimizer_state_dict": part}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder.parent / "latest").write_text("step1")
    return folder.parent


def test_a_deepspeed_folder_says_which_rank_holds_what(zero_2: Path) -> None:
    contents = inspect(zero_2, values=True)
    assert contents.sound
    assert len(contents.files) == 3
    ranks = [file for file in contents.files if "optim" in file.name]
    assert sum(file.tensor_nbytes for file in ranks) == contents.nbytes
    assert all(file.tensors for file in ranks)


def test_a_damaged_rank_of_deepspeed_is_named_and_shapes_are_still_shown(zero_2: Path, tmp_path: Path) -> None:
    shutil.copytree(zero_2, tmp_path, dirs_exist_ok=True)
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(tmp_path / "step1" / name, 300)
    contents = inspect(tmp_path)
    assert [(one.kind, one.file) for one in contents.damage] == [("unreadable", name)]
    assert {row.key: row.shape for row in contents.tensors} == {row.key: row.shape for row in inspect(zero_2).tensors}
    (tmp_path / "step1" / name).unlink()
    (damage,) = inspect(tmp_path).damage
    assert "1 files *_optim_states.pt" in damage.message


@pytest.mark.parametrize("shapes", [[("x",)], [{"x": 3}], [{"x": (2**40, 2**40)}], {"x": 1}, 5, None])
def test_shapes_that_are_none_are_damage_of_a_deepspeed_folder(shapes: object, zero_2: Path, tmp_path: Path) -> None:
    shutil.copytree(zero_2, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "step1" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file) | {"param_shapes": shapes}, file)
    contents = inspect(tmp_path)
    assert [one.kind for one in contents.damage] == ["unreadable"]
    assert {row.key for row in contents.tensors} == {name for name, _ in Model().named_parameters()}


# -- digests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_blocks", [True, False])
def test_bytes_that_differ_from_the_manifest_are_named_with_their_tensor(by_blocks: bool, letters: Path) -> None:
    manifest = write_manifest(letters, block_bytes=16)
    if not by_blocks:
        lines = manifest.read_text().splitlines()
        manifest.write_text("".join(f"{line}\n" for line in lines if not line.startswith("#")))
    assert inspect(letters, manifest=manifest).sound
    data = bytearray(letters.read_bytes())
    data[-1] ^= 1
    letters.write_bytes(data)
    assert inspect(letters).sound
    (damage,) = inspect(letters, manifest=manifest).damage
    assert damage.kind == "digest"
    assert "d" in damage.tensors
    assert set(damage.tensors) <= (set("cd") if by_blocks else set("abcd"))


def test_a_file_that_the_manifest_does_not_list_is_damage(tmp_path: Path) -> None:
    safetensors_index(tmp_path)
    manifest = write_manifest(tmp_path / "one.safetensors")
    assert {(one.kind, one.file) for one in inspect(tmp_path, manifest=manifest).damage} == {
        ("digest", "two.safetensors"),
        ("digest", "model.safetensors.index.json"),
    }


def test_what_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        inspect(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint in it"):
        inspect(tmp_path)
