"""One file of torch.save: where the state dict is found, regions of any layout, and what is refused."""

from __future__ import annotations

import argparse
import codecs
import os
import pickle
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from fabric_init.checkpoints import Box, Span, TensorSpec, TorchFileReader, open_checkpoint, take
from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

BOTH = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "copied"])


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@BOTH
def test_a_plain_state_dict_is_read(tmp_path: Path, mmap: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    reader = TorchFileReader(saved(tmp_path / "m.pt", model.state_dict()), mmap=mmap)
    assert list(reader.keys()) == list(model.state_dict())
    assert (reader.format, reader.note, reader.extra_state) == ("torch", None, {})
    for key, value in model.state_dict().items():
        assert reader.spec(key) == TensorSpec(value.shape, value.dtype)
        assert torch.equal(reader.read(key), value)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module"])
def test_a_state_dict_inside_a_training_checkpoint_is_found_and_noted(tmp_path: Path, wrapper: str) -> None:
    content = {
        "epoch": 3,
        "step": torch.tensor(7),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        wrapper: OrderedDict(w=torch.ones(2)),
    }
    reader = TorchFileReader(saved(tmp_path / "m.ckpt", content))
    assert reader.keys() == ("w",)
    assert reader.note == f"state dict found under '{wrapper}'"


def test_two_state_dicts_are_refused_rather_than_guessed_at(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"model": {"w": torch.ones(1)}, "module": {"w": torch.zeros(1)}})
    with pytest.raises(
        CheckpointFormatError, match=r"m\.pt holds 2 state dicts: 'model' \(1 tensor\), 'module' .*entry='model'"
    ):
        TorchFileReader(path)
    assert torch.equal(TorchFileReader(path, entry="module").read("w"), torch.zeros(1))


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"params": [0]}]}


def test_the_only_state_dict_is_found_under_any_name(tmp_path: Path) -> None:
    content = {"net": {"w": torch.ones(1), "b": torch.ones(1)}, "epoch": 1, "adam": OPTIMIZER}
    reader = TorchFileReader(saved(tmp_path / "m.pt", content))
    assert reader.keys() == ("w", "b")
    assert reader.note == "state dict found under 'net'"


def test_a_state_dict_is_found_in_a_dict_in_a_dict(tmp_path: Path) -> None:
    content = {"app": {"model": {"w": torch.ones(1)}, "optim": OPTIMIZER}, "other": {"w": torch.zeros(1)}}
    reader = TorchFileReader(saved(tmp_path / "m.pt", content))
    assert reader.note == "state dict found under 'app.model'"
    assert torch.equal(reader.read("w"), torch.ones(1))


def test_of_several_state_dicts_one_has_to_be_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"generator": {"w": torch.ones(1)}, "critic": {"w": torch.zeros(1)}})
    with pytest.raises(CheckpointFormatError, match=r"'generator' \(1 tensor\), 'critic' .*entry='generator'"):
        TorchFileReader(path)
    with pytest.raises(CheckpointFormatError, match=r"no state dict 'model'\. There are tensors under 'generator'"):
        TorchFileReader(path, entry="model")
    assert torch.equal(TorchFileReader(path, entry="critic").read("w"), torch.zeros(1))


def test_the_state_of_an_optimizer_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match="other than the state of optimizers"):
        TorchFileReader(saved(tmp_path / "m.pt", OPTIMIZER))


def test_a_dict_that_holds_itself_is_looked_at_once(tmp_path: Path) -> None:
    content: dict[str, object] = {"step": 1}
    content["again"] = [content] and {"self": content, "w": torch.ones(1)}
    assert TorchFileReader(saved(tmp_path / "m.pt", content)).keys() == ("w",)


def test_extra_state_is_kept_and_other_entries_have_no_key(tmp_path: Path) -> None:
    content = {"w": torch.ones(1), "q._extra_state": {"scale": 2}, "version": "1", "t._extra_state": torch.ones(1)}
    reader = TorchFileReader(saved(tmp_path / "m.pt", content))
    assert reader.keys() == ("w", "t._extra_state")
    assert reader.extra_state == {"q._extra_state": {"scale": 2}}


def test_tensors_in_extra_state_are_no_weights(tmp_path: Path) -> None:
    content = {"net": {"w": torch.ones(1), "q._extra_state": {"amax": torch.ones(3)}}}
    assert TorchFileReader(saved(tmp_path / "m.pt", content)).keys() == ("w",)


@BOTH
def test_regions_are_right_whatever_the_layout(tmp_path: Path, mmap: bool) -> None:
    base = torch.arange(60.0)
    content = {
        "plain": base.reshape(6, 10),
        "transposed": base.reshape(10, 6).t(),
        "offset": base[12:].reshape(6, 8),
        "strided": base.reshape(6, 10)[:, ::3],
        "expanded": base[:6, None].expand(6, 5),
        "conjugate": torch.view_as_complex(torch.arange(60.0).reshape(6, 5, 2)).conj(),
        "parameter": torch.nn.Parameter(base.reshape(6, 10)),
    }
    reader = TorchFileReader(saved(tmp_path / "m.pt", content), mmap=mmap)
    for key, value in content.items():
        for region in (None, Box((1, 1), (4, 2)), Box((2, 0), (2, value.shape[1])), Span(3, 17), Span(4, 4)):
            part = reader.read(key, region)
            assert torch.equal(part, take(value.detach().resolve_conj(), region)), (key, region)
            assert not part.requires_grad
            assert part._base is None


def test_writing_to_a_mapped_tensor_never_reaches_the_file_and_a_tie_stays_tied(tmp_path: Path) -> None:
    tied = torch.zeros(100)
    path = saved(tmp_path / "m.pt", {"a": tied, "b": tied})
    before = path.read_bytes()
    reader = TorchFileReader(path)
    reader.read("a").fill_(1.0)
    assert torch.equal(reader.read("b"), torch.ones(100))
    assert path.read_bytes() == before
    assert torch.equal(TorchFileReader(path).read("b"), torch.zeros(100))


def test_writing_never_reaches_the_file_although_shared_maps_are_the_default(tmp_path: Path) -> None:
    import mmap

    path = saved(tmp_path / "m.pt", {"a": torch.zeros(100)})
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        TorchFileReader(path).read("a").fill_(1.0)
    assert torch.equal(TorchFileReader(path).read("a"), torch.zeros(100))


def test_a_copied_tensor_does_not_depend_on_the_reader(tmp_path: Path) -> None:
    reader = TorchFileReader(saved(tmp_path / "m.pt", {"a": torch.zeros(100)}), mmap=False)
    reader.read("a").fill_(1.0)
    assert torch.equal(reader.read("a", Span(0, 3)), torch.zeros(3))
    assert reader.read("a", Span(0, 3)).untyped_storage().nbytes() == 12


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.ckpt", {"state_dict": {"w": torch.ones(1)}, "args": argparse.Namespace(x=1)})
    with pytest.raises(
        CheckpointFormatError, match=r"m\.ckpt holds more than tensors: .*argparse\.Namespace"
    ) as caught:
        TorchFileReader(path)
    assert "safetensors.torch.save_file" in str(caught.value)
    assert "add_safe_globals" in str(caught.value)


def test_code_is_not_run_even_when_the_environment_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointFormatError, match=r"argparse\.Namespace"):
        TorchFileReader(saved(tmp_path / "m.pt", {"w": torch.ones(1), "args": argparse.Namespace()}))


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"torch\.nn\.modules\.linear\.Linear"):
        TorchFileReader(saved(tmp_path / "m.pt", torch.nn.Linear(2, 2)))


def legacy(path: Path, content: object) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


@BOTH
def test_the_legacy_format_is_read_into_memory_and_noted(tmp_path: Path, mmap: bool) -> None:
    base = torch.arange(60.0)
    content = {"w": base.reshape(6, 10), "t": base.reshape(10, 6).t(), "h": base[:7].bfloat16(), "n": torch.tensor(3)}
    reader = TorchFileReader(legacy(tmp_path / "m.pt", {"model": content, "step": 3}), mmap=mmap)
    assert (
        reader.note == "state dict found under 'model'; legacy format of before torch 1.6: all of the file is in memory"
    )
    for key, value in content.items():
        assert reader.spec(key) == TensorSpec(value.shape, value.dtype)
        assert torch.equal(reader.read(key), value)
        span = Span(value.numel() // 3, value.numel())
        assert torch.equal(reader.read(key, span), take(value, span))


def test_code_in_a_legacy_file_is_not_run(tmp_path: Path, harmful: object, marker: Path) -> None:
    path = legacy(tmp_path / "m.pt", {"w": torch.ones(1), "x": harmful})
    with pytest.raises(CheckpointFormatError, match=r"m\.pt holds more than tensors: its pickle names .*mkdir"):
        TorchFileReader(path)
    assert not marker.exists()


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.99])
def test_a_truncated_legacy_file_is_refused(tmp_path: Path, part: float) -> None:
    path = legacy(tmp_path / "m.pt", {"w": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointFormatError, match=r"m\.pt cannot be read as a file of torch\.save"):
        TorchFileReader(path)


@pytest.mark.parametrize("content", [{"model": {"w": torch.ones(2)}}, {"w": torch.ones(2)}], ids=["wrapped", "plain"])
def test_litgpts_checkpoint_folder_is_read(tmp_path: Path, content: object) -> None:
    saved(tmp_path / "lit_model.pth", content)
    (tmp_path / "model_config.yaml").write_text("n_layer: 2")
    assert torch.equal(open_checkpoint(tmp_path).read("w"), torch.ones(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
        ({}, "holds no tensor"),
        ({"epoch": 1}, "holds no tensor"),
        ({0: torch.ones(1)}, "has the key 0, a int"),
        ({"w": torch.ones(2, 2).to_sparse()}, "'w' is torch.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, "'w' is on the 'meta' device"),
    ],
)
def test_content_that_is_no_dense_state_dict_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        TorchFileReader(saved(tmp_path / "m.pt", content))
    assert str(tmp_path / "m.pt") in str(caught.value)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    path = saved(tmp_path / "m.pt", {"w": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointFormatError, match=r"m\.pt cannot be read as a file of torch\.save"):
        TorchFileReader(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("a.txt", "b")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "p.pt").write_bytes(pickle.dumps({"w": 1}))
    for name, message in {
        "z.pt": "cannot be read",
        "text.pt": "begins with b'hello'",
        "empty.pt": "is empty",
        "p.pt": "cannot be read as a file of torch",
    }.items():
        with pytest.raises(CheckpointFormatError, match=message):
            TorchFileReader(tmp_path / name)
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        TorchFileReader(tmp_path / "none.pt")


def test_an_unknown_key_is_a_key_error_that_names_the_file(tmp_path: Path) -> None:
    reader = TorchFileReader(saved(tmp_path / "m.pt", {"w": torch.ones(1)}))
    for ask in (reader.spec, reader.read):
        with pytest.raises(KeyError, match=r"m\.pt has no tensor 'nope'"):
            ask("nope")


def test_a_legacy_file_that_asks_for_more_memory_than_it_has_bytes_is_refused_before_torch_asks(tmp_path: Path) -> None:
    path = legacy(tmp_path / "w.pt", {"w": torch.ones(300)})
    good = path.read_bytes()
    # 300 is the number of elements in the storage, then the size of the tensor.
    count = b"M" + struct.pack("<H", 300)
    for place in (good.index(count), good.rindex(count)):
        path.write_bytes(good[:place] + b"J" + struct.pack("<i", 2**31 - 1) + good[place + 3 :])
        with pytest.raises(CheckpointFormatError, match=r"w\.pt .*(storages should take more|ends at byte 8,589,934)"):
            TorchFileReader(path)


def test_a_legacy_state_dict_with_a_tie_a_view_and_metadata_is_not_refused(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    state = linear.state_dict()
    state["tied"], state["turned"], state["row"] = state["weight"], state["weight"].t(), state["weight"][1]
    reader = TorchFileReader(legacy(tmp_path / "w.pt", state))
    for key, value in state.items():
        assert torch.equal(reader.read(key), value)


def test_sizes_and_strides_that_none_can_have_are_refused(tmp_path: Path) -> None:
    for size, stride in (((0, -5), (1, 1)), ((1,), (2**63 - 1,))):
        wrong = torch.ones(1).as_strided((0,), (1,))
        wrong.set_(torch.ones(1).untyped_storage(), 0, size, stride)
        torch.save({"w": wrong}, tmp_path / "w.pt")
        with pytest.raises(CheckpointFormatError, match=r"'w' is of shape .* the file is damaged"):
            TorchFileReader(tmp_path / "w.pt")


def test_a_tensor_beyond_its_storage_is_refused_where_the_archive_is_read_by_itself(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(200)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                place = content.rindex(b"K" + bytes([200]))
                content = content[: place + 1] + bytes([201]) + content[place + 2 :]
            new.writestr(info.filename, content)
    with pytest.raises(CheckpointFormatError, match=r"'w' is larger than its storage"):
        TorchFileReader(tmp_path / "new.pt", opener=lambda path: open_bytes(path, mmap=False))


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: it gives them up
        weight = torch._empty_affine_quantized([2], scale=0.1, zero_point=0, dtype=torch.qint8)
        torch.save({"w": weight}, tmp_path / "w.pt")
        with pytest.raises(CheckpointFormatError, match=r"w\.pt: tensor 'w' is quantized, torch\.qint8"):
            TorchFileReader(tmp_path / "w.pt")


@BOTH
def test_tensors_in_extra_state_have_their_values(tmp_path: Path, mmap: bool) -> None:
    content = {"w": torch.ones(1), "q._extra_state": {"amax": [torch.arange(3.0)], "n": 2}}
    reader = TorchFileReader(saved(tmp_path / "m.pt", content), mmap=mmap)
    assert torch.equal(reader.extra_state["q._extra_state"]["amax"][0], torch.arange(3.0))


@BOTH
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, mmap: bool) -> None:
    for change in (lambda path: os.truncate(path, 5000), lambda path: os.utime(path, (1, 1))):
        path = saved(tmp_path / "m.pt", {"a": torch.ones(3000), "b": torch.ones(3000)})
        reader = TorchFileReader(path, mmap=mmap)
        reader.read("a")
        change(path)
        with pytest.raises(CheckpointFormatError, match=r"m\.pt changed after it was opened"):
            reader.read("b")
        path.unlink()


def test_a_mapped_file_that_another_takes_the_place_of_is_read_to_its_end(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"a": torch.ones(3000)})
    reader = TorchFileReader(path)
    saved(tmp_path / "new.pt", {"a": torch.zeros(3)}).replace(path)
    assert torch.equal(reader.read("a"), torch.ones(3000))
    path.unlink()
    assert torch.equal(reader.read("a"), torch.ones(3000))


class Called:
    """What a crafted pickle holds: this call, which torch's ``weights_only`` allows."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


def _doubled(times: int) -> object:
    return Called(codecs.encode, _doubled(times - 1) if times else "a", "hex")


HUGE = 10**12
ASKING = {
    "bytearray": Called(bytearray, HUGE),
    "many bytearrays": [Called(bytearray, 50_000) for _ in range(50)],
    "sets of one list": [Called(set, LONG) for LONG in [list(range(9999))] for _ in range(999)],
    "storage": Called(torch.FloatStorage, HUGE),
    "untyped storage": Called(torch.UntypedStorage, HUGE),
    "old tensor": Called(torch.FloatTensor, HUGE),
    "tensor by its size": Called(torch.Tensor, torch.Size([HUGE])),
    "doubling": _doubled(40),
    "through a subclass": Called(torch._tensor._rebuild_from_type_v2, bytearray, bytearray, (HUGE,), None),
    "copy of an expanded tensor": Called(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(1).expand(9), torch.float64, "cpu", False
    ),
}


@pytest.mark.parametrize("what", ASKING)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_asks_for_memory_without_bound_is_refused_before_it_gets_any(
    tmp_path: Path, what: str, zipped: bool
) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2), "x": ASKING[what]}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointFormatError, match=r"m\.pt .* takes memory without bound"):
        TorchFileReader(path)


def test_calls_that_torch_makes_itself_are_not_refused(tmp_path: Path) -> None:
    content = {
        "w": torch.nn.Parameter(torch.ones(2)),
        "bytes": bytearray(b"abc" * 99),
        "counts": Counter("aab"),
        "set": {1, 2},
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "complex": 2j,
        "dtype": torch.float16,
        "state": torch.nn.BatchNorm1d(2).state_dict(),
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        assert torch.equal(TorchFileReader(tmp_path / "m.pt", entry="").read("w"), torch.ones(2))
