"""Folders that the real DeepSpeed wrote, with two ranks on the CPU, at every ZeRO stage."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_init.checkpoints import DeepSpeedFolderReader, Span, open_checkpoint, take, write_manifest
from fabric_init.checkpoints.state_dicts import CHECKPOINT_WRAPPER
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from tests.support.deepspeed_saves import SAVED, save_each
from tests.support.ranks import run_ranks
from tests.support.regions import regions

SAVES = [f"zero{stage}-{precision}" for stage, precision in SAVED]
WITH_MASTERS = [save for save in SAVES if not save.startswith("zero0")]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of DeepSpeed for all tests here."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, save_each, folder=folder, seconds=300)
    return folder


@pytest.fixture
def copy(saves: Path, tmp_path: Path) -> Path:
    """All of them, to be damaged."""
    return Path(shutil.copytree(saves, tmp_path / "copy"))


def expected(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "expected.pth", weights_only=True)
    return state


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("save", SAVES)
def test_every_tensor_is_what_deepspeed_held(saves: Path, save: str, mmap: bool) -> None:
    for path in (saves / save, saves / save / "step2"):
        reader = open_checkpoint(path, mmap=mmap)
        wanted = expected(saves / save)
        assert sorted(reader.keys()) == sorted(wanted)
        for key, value in wanted.items():
            assert reader.spec(key).dtype == value.dtype
            assert reader.spec(key).shape == value.shape
            assert torch.equal(reader.read(key), value), key


def test_masters_are_taken_for_what_is_trained_and_the_rest_as_it_is(saves: Path) -> None:
    reader = open_checkpoint(saves / "zero3-bf16")
    assert reader.format == "DeepSpeed ZeRO-3"
    assert reader.note == "trainable parameters are the fp32 masters that 2 ranks saved"
    dtypes = {key: reader.spec(key).dtype for key in reader.keys()}
    assert dtypes["inner.weight"] == torch.float32
    assert dtypes["frozen.weight"] == torch.bfloat16
    assert dtypes["count"] == torch.int64
    plain = open_checkpoint(saves / "zero0-bf16")
    assert (plain.format, plain.note) == ("DeepSpeed", None)
    assert plain.spec("inner.weight").dtype == torch.bfloat16


def test_the_weights_in_16_bits_are_in_the_file_of_stage_1_itself(saves: Path) -> None:
    reader = open_checkpoint(saves / "zero1-bf16" / "step2" / "mp_rank_00_model_states.pt")
    assert reader.note == "state dict found under 'module'"
    assert reader.spec("inner.weight").dtype == torch.bfloat16
    assert torch.equal(reader.read("inner.weight"), expected(saves / "zero1-bf16")["inner.weight"].bfloat16())


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_region_is_the_same_part_of_the_whole(saves: Path, data: st.DataObject) -> None:
    save = data.draw(st.sampled_from(SAVES))
    reader = open_checkpoint(saves / save, mmap=data.draw(st.booleans()))
    key = data.draw(st.sampled_from(list(reader.keys())))
    region = data.draw(regions(tuple(reader.spec(key).shape)))
    assert torch.equal(reader.read(key, region), take(expected(saves / save)[key], region))


def test_a_region_in_one_ranks_part_is_a_view_of_its_map(saves: Path) -> None:
    reader = open_checkpoint(saves / "zero3-bf16")
    one, other = reader.read("inner.weight", Span(0, 4)), reader.read("inner.weight", Span(0, 4))
    assert one.data_ptr() == other.data_ptr()
    copied = open_checkpoint(saves / "zero3-bf16", mmap=False)
    assert copied.read("inner.weight", Span(0, 4)).data_ptr() != copied.read("inner.weight", Span(0, 4)).data_ptr()


@pytest.mark.parametrize("save", SAVES)
def test_masters_of_modules_with_checkpoint_wrappers_have_the_names_of_the_state_dict(copy: Path, save: str) -> None:
    wanted = expected(copy / save)
    for file in copy.glob(f"{save}/**/*_model_states.pt"):
        states = torch.load(file, weights_only=False)
        for name in ("param_shapes", "frozen_param_shapes", "frozen_param_fragments"):
            groups = states.get(name) or {}
            for shapes in groups if isinstance(groups, list) else [groups]:
                wrapped = [(f"{CHECKPOINT_WRAPPER}{key}", value) for key, value in shapes.items()]
                shapes.clear()
                shapes.update(wrapped)
        shared = (states.get("shared_params") or {}).items()
        states["shared_params"] = {
            f"{CHECKPOINT_WRAPPER}{one}": f"{CHECKPOINT_WRAPPER}{other}" for one, other in shared
        }
        torch.save(states, file)
    reader = open_checkpoint(copy / save)
    assert set(reader.keys()) == wanted.keys()
    assert all(torch.equal(reader.read(key), value) for key, value in wanted.items())


def test_deepspeed_is_not_imported_to_read_its_files(saves: Path) -> None:
    code = (
        "import sys; from fabric_init.checkpoints import open_checkpoint\n"
        f"r = open_checkpoint({str(saves / 'zero2-fp32')!r}); [r.read(k) for k in r.keys()]\n"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_manifest_covers_every_file_of_the_folder(copy: Path) -> None:
    folder = copy / "zero3-bf16"
    sums = write_manifest(folder)
    wanted = expected(folder)
    sums.rename(copy / "SUMS")
    reader = open_checkpoint(folder, manifest=copy / "SUMS")
    assert torch.equal(reader.read("inner.weight"), wanted["inner.weight"])
    victim = folder / "step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=rf"{re.escape(str(victim))}: SHA-256 mismatch"):
        open_checkpoint(folder, manifest=copy / "SUMS")


# -- what is wrong with a folder -----------------------------------------------------------------------------------


def test_a_missing_rank_is_named(copy: Path) -> None:
    (copy / "zero2-fp32/step2/zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match="lacks the file of rank 0"):
        open_checkpoint(copy / "zero2-fp32")
    (copy / "zero1-bf16/step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointFormatError, match=r"saved by 2 ranks, and 1 files \*_optim_states.pt are there"):
        open_checkpoint(copy / "zero1-bf16")


def test_without_the_optimizer_files_stage_2_has_the_weights_of_the_module_and_stage_3_none(copy: Path) -> None:
    for file in copy.rglob("*_optim_states.pt"):
        file.unlink()
    reader = open_checkpoint(copy / "zero1-bf16")
    assert "no fp32 masters" in str(reader.note)
    assert reader.spec("inner.weight").dtype == torch.bfloat16
    with pytest.raises(CheckpointFormatError, match=r"it is of ZeRO-3.* of .* are not"):
        open_checkpoint(copy / "zero3-bf16")


@pytest.mark.parametrize(
    ("tag", "error"), [("../zero1-bf16/step2", "name of a folder"), ("step3", "no such folder"), ("", "name of a")]
)
def test_latest_must_name_a_folder_beside_it(copy: Path, tag: str, error: str) -> None:
    (copy / "zero2-fp32/latest").write_text(tag)
    with pytest.raises(CheckpointError, match=error):
        open_checkpoint(copy / "zero2-fp32")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_00-model_states.pt", "pipeline or expert"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "pipeline or expert"),
    ],
)
def test_other_kinds_of_parallelism_are_refused_with_a_way_out(copy: Path, name: str, what: str) -> None:
    (copy / "zero2-fp32/step2" / name).touch()
    with pytest.raises(CheckpointFormatError, match=f"(?s){what}.*ds_to_universal"):
        open_checkpoint(copy / "zero2-fp32")


def test_files_of_two_runs_in_one_folder_are_refused(copy: Path) -> None:
    folder = copy / "zero2-fp32/step2"
    shutil.copy(
        folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    with pytest.raises(CheckpointFormatError, match="two files for rank 0"):
        open_checkpoint(copy / "zero2-fp32")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo owned > /dev/null",)


def test_code_in_a_pickle_does_not_run(copy: Path) -> None:
    victim = copy / "zero2-fp32/step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Malicious()}, victim)
    with pytest.raises(CheckpointFormatError, match=r"rank_1_mp_\w+.pt holds more than tensors.*system"):
        open_checkpoint(copy / "zero2-fp32")
    assert not [one for one in torch.serialization.get_safe_globals() if "deepspeed" in str(one)]


@contextmanager
def refusals_that_name(path: Path) -> Iterator[None]:
    refusal = None
    try:
        yield
    except CheckpointError as error:
        refusal = str(error)
    assert refusal is None or str(path) in refusal


CHANGES: dict[str, Any] = {
    "param_shapes": [
        None, [], [{}], {"a": 1}, [{"inner.weight": "x"}], [{"inner.weight": torch.Size([9, 50])}, {}],
        [{"a": torch.Size([2**40, 2**40])}, {}], [{7: torch.Size([1])}, {}],
    ],
    "frozen_param_shapes": [3, {"frozen.weight": torch.Size([3, 900])}, {"nowhere": torch.Size([1])}],
    "frozen_param_fragments": [None, {}, {"frozen.weight": 5}, {"frozen.weight": torch.zeros(2, 2)}],
    "shared_params": [[], {"a": 3, 4: "b"}],
    "module": [None, {}, {"x": torch.ones(2).to_sparse()}, {1: torch.ones(2)}],
    "zero_stage": [0, 1, 4, None, "3", [3]],
    "partition_count": [1, 3, [2, 2], [], None, "2"],
    "fp32_flat_groups": [None, [], [torch.zeros(3)], [torch.zeros(2, 2)], [torch.zeros(65, device="meta")], [1]],
    "single_partition_of_fp32_groups": [None, [], [torch.zeros(3), torch.zeros(3)], [torch.zeros(())] * 2],
    "param_alignment_paddings": [[], [[0]], [[0, 0, 0], [0, 0, 0, 2**62]], [["x"] * 3, [None] * 4], 5],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CHANGES.items() for value in values])
@pytest.mark.parametrize("save", ["zero2-fp32", "zero3-fp32"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_metadata_that_lies_is_an_error_of_ours_or_changes_nothing(
    copy: Path, save: str, key: str, value: object
) -> None:
    folder = copy / save / "step2"
    for file in folder.glob("*.pt"):
        with torch.serialization.safe_globals(STAND_INS):
            state = torch.load(file, weights_only=True)
        for name in ("param_slice_mappings", "loss_scaler"):  # of classes that are not there
            state.get("optimizer_state_dict", {}).pop(name, None)
        for holder in (state, state.get("optimizer_state_dict", {})):
            if key in holder:
                holder[key] = value
        torch.save(state, file)
    with refusals_that_name(copy):
        reader = open_checkpoint(folder)
        wanted = expected(copy / save)
        for name in set(reader.keys()) & wanted.keys():
            assert torch.equal(reader.read(name), wanted[name])


class Held:
    """Keeps what DeepSpeed's classes keep, so that a changed file can be written."""


STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Held, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Held, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_errors_of_ours(saves: Path, tmp_path: Path, data: st.DataObject) -> None:
    save = data.draw(st.sampled_from(WITH_MASTERS))
    folder = tmp_path / save
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saves / save / "step2", folder)
    victim = data.draw(st.sampled_from(sorted(folder.glob("*.pt"))))
    content = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    with refusals_that_name(folder):
        reader = DeepSpeedFolderReader(folder)
        for key in reader.keys():
            assert reader.read(key).shape == reader.spec(key).shape


@pytest.mark.parametrize("save", WITH_MASTERS)
def test_a_record_without_its_header_is_found_when_it_is_read_and_its_file_named(copy: Path, save: str) -> None:
    for victim in sorted((copy / save / "step2").glob("*_optim_states.pt")):
        content = victim.read_bytes()
        with zipfile.ZipFile(victim) as archive:
            starts = {record.header_offset for record in archive.infolist() if "/data/" in record.filename}
        damaged = bytearray(content)
        for start in starts:
            damaged[start] ^= 1
        victim.write_bytes(damaged)
        reader = open_checkpoint(copy / save)
        with pytest.raises(CheckpointFormatError, match=rf"{victim.name} .*there is no header of the record"):
            for key in reader.keys():
                reader.read(key)
        victim.unlink()  # it is mapped
        victim.write_bytes(content)


def test_a_pickle_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"module": {}}))
    with pytest.raises(CheckpointFormatError, match=r"mp_rank_00_model_states.pt"):
        open_checkpoint(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").unlink()
    (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"_states.pt"):
        open_checkpoint(tmp_path)
