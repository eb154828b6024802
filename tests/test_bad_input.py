"""Bad input: an error that names the file, key or tensor and the fix, and everything is as it was before."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fabric_init import (
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    Fabric,
    FabricInitError,
    OptionError,
    deferred_init,
    materialize,
)
from fabric_init.checkpoints import Transpose
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor
from tests.support.recordings import is_recorded

# 2 GiB once it has memory; recorded it has none.
WIDE = 16384
ROWS = 32768


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.huge = nn.Parameter(torch.ones(ROWS, WIDE))
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


class Small(nn.Module):
    """As :class:`Model`, small enough to be filled."""

    def __init__(self) -> None:
        super().__init__()
        self.huge = nn.Parameter(torch.ones(2, 2))
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


def state(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    whole = {
        "huge": torch.ones(2, 2),
        "embedding.weight": torch.ones(4, 3),
        "head.weight": torch.ones(4, 3),
        "head.bias": torch.ones(4),
        "count": torch.ones(2, dtype=torch.int64),
    }
    whole |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


def fits(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A state dict whose ``huge`` has the huge model's shape, and next to no bytes."""
    return state(**{"huge": torch.zeros(1).expand(ROWS, WIDE), **changes})


CANARY = "fabric_init_canary"


class Bomb:
    """Unpickling it makes a file: the sign that code in a pickle ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@dataclass
class Bad:
    """One mistake: what lies on the disk, what is asked for, and what the error has to say."""

    make: Callable[[Path], Path]
    error: type[Exception]
    says: list[str]
    options: dict[str, Any] = field(default_factory=dict)


def torch_file(content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "model.pt")
        return folder / "model.pt"

    return make


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def cut(suffix: str, part: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"model{suffix}"
        save_file(state(head__weight=None), path) if suffix == ".safetensors" else torch.save(state(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        return path

    return make


def corrupt_header(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(state(head__weight=None), path)
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20
    path.write_bytes(bytes(content))
    return path


def missing_shard(folder: Path) -> Path:
    save_file({"huge": torch.ones(2, 2)}, folder / "model-00001-of-00002.safetensors")
    weights = {name: "model-00001-of-00002.safetensors" for name in state()} | {
        "head.bias": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return folder


def index_and_shard_disagree(folder: Path) -> Path:
    save_file({"huge": torch.ones(2, 2)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.bias": "a.safetensors"}}))
    return folder


def bomb(folder: Path) -> Path:
    torch.save({**state(), "bomb": Bomb(folder / CANARY)}, folder / "model.pt")
    return folder / "model.pt"


def bare_bomb(folder: Path) -> Path:
    (folder / "model.bin").write_bytes(pickle.dumps({**state(), "bomb": Bomb(folder / CANARY)}))
    return folder / "model.bin"


def empty_folder(folder: Path) -> Path:
    (folder / "readme.txt").write_text("weights follow")
    return folder


BAD: dict[str, Bad] = {
    "missing file": Bad(lambda f: f / "modl.pt", CheckpointNotFoundError, ["modl.pt", "does not exist"]),
    "missing folder": Bad(lambda f: f / "a" / "b", CheckpointNotFoundError, ["a/b", "no folder"]),
    "no checkpoint in the folder": Bad(
        empty_folder, CheckpointNotFoundError, ["no checkpoint", "readme.txt", "model.safetensors"]
    ),
    "empty file": Bad(write("model.safetensors", b""), CheckpointFormatError, ["model.safetensors", "empty"]),
    "empty torch file": Bad(write("model.pt", b""), CheckpointFormatError, ["model.pt", "empty"]),
    "text": Bad(write("model.pt", b"hello world"), CheckpointFormatError, ["model.pt", "hello"]),
    "an error page": Bad(write("model.bin", b"<!DOCTYPE html>"), CheckpointFormatError, ["model.bin", "HTML"]),
    "a git lfs pointer": Bad(
        write("model.bin", b"version https://git-lfs.github.com/spec/v1\n"), CheckpointFormatError, ["git lfs pull"]
    ),
    "cut safetensors": Bad(cut(".safetensors", 0.9), CheckpointFormatError, ["model.safetensors", "fetch it again"]),
    "safetensors cut in the header": Bad(cut(".safetensors", 0.1), CheckpointFormatError, ["model.safetensors"]),
    "cut torch file": Bad(cut(".pt", 0.7), CheckpointFormatError, ["model.pt", "fetch it again"]),
    "corrupt header": Bad(corrupt_header, CheckpointFormatError, ["model.safetensors"]),
    "missing shard": Bad(
        missing_shard, CheckpointNotFoundError, ["index.json", "model-00002-of-00002.safetensors", "complete"]
    ),
    "index and shard disagree": Bad(
        index_and_shard_disagree, CheckpointFormatError, ["head.bias", "a.safetensors", "together"]
    ),
    "code in the pickle": Bad(bomb, CheckpointFormatError, ["model.pt", "mkdir", "safetensors"]),
    "a bare pickle with code": Bad(bare_bomb, CheckpointFormatError, ["model.bin", "torch.save"]),
    "not a state dict": Bad(torch_file([1, 2]), CheckpointFormatError, ["model.pt", "list", "state_dict()"]),
    "no tensors": Bad(torch_file({"epoch": 3}), CheckpointFormatError, ["model.pt", "no tensor"]),
    "a whole module": Bad(torch_file(nn.Linear(2, 2)), CheckpointFormatError, ["model.pt", "Linear"]),
    "another model": Bad(
        torch_file({"conv.weight": torch.ones(9, 9), "conv.bias": torch.ones(9)}),
        CheckpointMismatchError,
        ["model.pt", "0 of 4 tensors match", "conv.weight", "head.bias", "another model"],
    ),
    "another model, not strict": Bad(
        torch_file({"conv.weight": torch.ones(9, 9)}),
        CheckpointMismatchError,
        ["model.pt", "0 of 4 tensors match", "another model"],
        {"strict": False},
    ),
    "a prefix": Bad(
        torch_file({f"model.{name}": tensor for name, tensor in fits().items()}),
        CheckpointMismatchError,
        ["0 of 4 tensors match", r'rename={r"^model\.": ""}', "all 4"],
    ),
    "missing keys": Bad(
        torch_file(fits(head__bias=None, count=None)),
        CheckpointMismatchError,
        ["model.pt", "2 of 4 tensors match", "  head.bias", "  count", "strict=False"],
    ),
    "unexpected keys": Bad(
        torch_file(fits(extra=torch.ones(3))),
        CheckpointMismatchError,
        ["model.pt", "4 of 4 tensors match", "  extra", "strict=False"],
    ),
    "wrong shapes": Bad(
        torch_file(fits(head__bias=torch.ones(5))),
        CheckpointMismatchError,
        ["model.pt", "head.bias is (4,) in the model and (5,) in the checkpoint", 'reinit=["head.bias"]'],
    ),
    "wrong shapes, not strict": Bad(
        torch_file(fits(head__bias=torch.ones(5), huge=torch.ones(2, 2))),
        CheckpointMismatchError,
        ["head.bias is (4,)", f"huge is ({ROWS}, {WIDE}) in the model and (2, 2)", "reinit"],
        {"strict": False},
    ),
    "floats for integers": Bad(
        torch_file(fits(count=torch.ones(2))), CheckpointMismatchError, ["count", "torch.int64", "torch.float32"]
    ),
    "integers for floats": Bad(
        torch_file(fits(head__bias=torch.ones(4, dtype=torch.int8))),
        CheckpointMismatchError,
        ["head.bias", "torch.int8", "torch.float32"],
    ),
    "invalid regex": Bad(
        torch_file(fits()),
        OptionError,
        ["rename", "model(", "regular expression"],
        {"rename": {"model(": ""}},
    ),
    "invalid replacement": Bad(
        torch_file(fits()),
        OptionError,
        ["rename", r"\\2", "regular expression"],
        {"rename": {"(model)": r"\2"}},
    ),
    "rename that collides": Bad(
        torch_file(fits()), CheckpointMismatchError, ["rename", "'w'", "more specific"], {"rename": {".*weight": "w"}}
    ),
    "rename that returns no name": Bad(
        torch_file(fits()), OptionError, ["rename('huge')", "7"], {"rename": lambda key: 7}
    ),
    "reinit of nothing": Bad(torch_file(fits()), OptionError, ["haed.*", "names no tensor"], {"reinit": ["haed.*"]}),
    "tied keys of different values": Bad(
        torch_file(fits(head__weight=torch.zeros(4, 3))),
        CheckpointMismatchError,
        ["model.pt", "embedding.weight", "head.weight", "tied", "rename"],
    ),
}


def torch_state() -> dict[str, Any]:
    return {
        "function modes": _len_torch_function_stack(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "collector": gc.isenabled(),
        "trunc_normal_": torch.nn.init._no_grad_trunc_normal_,
    }


@contextmanager
def no_weight_is_allocated() -> Iterator[None]:
    """Fails when the process grows by as much as a quarter of the huge weight, even for a moment."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss
    yield
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    grown = (int(found[1]) << 10) - before
    assert grown < 512 << 20, f"memory for the weight was taken on the way: {grown >> 20} MiB"


def by_materialize(build: Callable[[], nn.Module], path: Path, options: dict[str, Any]) -> Iterator[nn.Module]:
    with deferred_init():
        model = build()
    yield model
    materialize(model, checkpoint=path, **options)


def by_fabric(build: Callable[[], nn.Module], path: Path, options: dict[str, Any]) -> Iterator[nn.Module]:
    with Fabric(accelerator="cpu", devices=1).init_module(checkpoint=path, **options):
        model = build()
        yield model


def failing(way: Any, build: Callable[[], nn.Module], path: Path, bad: Bad) -> tuple[nn.Module | None, str]:
    """The model as the error left it (none if the block was never entered), and the message."""
    models: list[nn.Module] = []
    with pytest.raises(bad.error) as caught:
        models.extend(way(build, path, bad.options))
    assert isinstance(caught.value, FabricInitError)
    return (models[0] if models else None), str(caught.value)


WAYS = pytest.mark.parametrize("way", [by_materialize, by_fabric], ids=["materialize", "Fabric"])


@WAYS
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_the_error_says_what_and_where_and_all_is_as_it_was(tmp_path: Path, way: Any, bad: Bad) -> None:
    path = bad.make(tmp_path)
    before = torch_state()
    torch.manual_seed(3)
    with no_weight_is_allocated():
        model, message = failing(way, Model, path, bad)
    assert [word for word in bad.says if word not in message] == []
    assert torch_state() == before
    assert not (tmp_path / CANARY).exists()
    # random numbers and eager models work as ever
    assert torch.rand(3).std() > 0
    assert nn.Linear(2, 2)(torch.ones(1, 2)).isfinite().all()
    if model is None:
        assert way is by_fabric
        assert bad.error in (CheckpointNotFoundError, CheckpointFormatError)  # seen before the model was built
        return
    assert all(is_recorded(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.embedding.weight
    # the model can be given its values after all: all but the huge one, which stays recorded, part by part
    report = materialize(model.head)
    assert report.complete
    assert model.head.weight.isfinite().all()
    assert is_recorded(model.huge)


FILLABLE = [name for name, bad in BAD.items() if bad.error in (CheckpointMismatchError, OptionError)]


@WAYS
@pytest.mark.parametrize("name", FILLABLE)
def test_the_same_model_takes_a_good_checkpoint_afterwards(tmp_path: Path, way: Any, name: str) -> None:
    model, _ = failing(way, Small, BAD[name].make(tmp_path), BAD[name])
    assert model is not None
    torch.save(state(), tmp_path / "good.pt")
    report = materialize(model, checkpoint=tmp_path / "good.pt")
    assert {row.status for row in report.rows} == {"loaded"}
    for key, value in state().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_the_canary_sings_where_code_in_a_pickle_runs(tmp_path: Path) -> None:
    torch.load(bomb(tmp_path), weights_only=False)
    assert (tmp_path / CANARY).exists()


def test_the_watch_on_memory_sees_a_weight() -> None:
    def take() -> None:
        with no_weight_is_allocated():
            torch.ones(640 << 18).sum()  # 640 MiB

    with pytest.raises(AssertionError, match="memory for the weight was taken"):
        take()


def test_contradictions_are_refused_at_the_call_and_name_both_sides(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "m.pt")
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(FabricInitError, match=r"empty_init=False.*checkpoint"):
        fabric.init_module(False, checkpoint=tmp_path / "m.pt")
    useless: list[dict[str, Any]] = [{"rename": {"a": "b"}}, {"reinit": ["a"]}, {"strict": False}, {"mmap": False}]
    useless += [{"entry": "model"}, {"manifest": "SHA256SUMS"}, {"convert": [Transpose(["a"])]}]
    with deferred_init():
        model = Small()
    for options in useless:
        with pytest.raises(OptionError, match=rf"no checkpoint=….*: {next(iter(options))}"):
            materialize(model, **options)
        for empty_init in (None, True, False):
            with pytest.raises(OptionError, match=rf"no checkpoint=….*: {next(iter(options))}"):
                fabric.init_module(empty_init, **options)


def test_reinit_as_a_string_is_refused_at_the_call_and_all_is_as_it_was(tmp_path: Path) -> None:
    path = torch_file(state())(tmp_path)
    before = torch_state()
    with deferred_init():
        model = Small()
    with pytest.raises(TypeError, match=r"a list.*reinit=\['head\.\*'\]"):
        materialize(model, checkpoint=path, reinit="head.*")
    with pytest.raises(TypeError, match=r"a list.*reinit=\['head\.\*'\]"):
        Fabric(accelerator="cpu", devices=1).init_module(checkpoint=path, reinit="head.*")
    assert torch_state() == before
    assert all(isinstance(tensor, RecordedTensor) for tensor in (*model.parameters(), *model.buffers()))
    assert {row.status for row in materialize(model, checkpoint=path).rows} == {"loaded"}


def test_a_state_dict_is_no_path_and_what_takes_it_is_named() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
    content = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    with pytest.raises(OptionError, match=r"not a state dict: for one in memory, call model.load_state_dict"):
        materialize(model, checkpoint=content)  # type: ignore[arg-type]
    model.load_state_dict(content)
    assert torch.equal(model.weight, content["weight"])


def test_options_without_a_checkpoint_are_all_named() -> None:
    with deferred_init():
        model = Small()
    with pytest.raises(OptionError, match=r"no effect: strict=False, mmap=False, entry$"):
        materialize(model, strict=False, mmap=False, entry="model")


@pytest.mark.parametrize("device", ["model.safetensors", Path("model.safetensors")])
def test_a_path_in_place_of_the_device_is_refused_with_the_right_argument(device: Any) -> None:
    with deferred_init():
        model = Small()
    with pytest.raises(TypeError, match=r"is no device.*checkpoint=.*model\.safetensors"):
        materialize(model, device=device)
    with pytest.raises(TypeError, match="positional"):
        materialize(model, device)  # type: ignore[misc]


def test_an_error_after_setup_of_a_good_model_leaves_that_model_alone(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "good.pt")
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(checkpoint=tmp_path / "good.pt"):
        good = Small()
    with pytest.raises(CheckpointNotFoundError), fabric.init_module(checkpoint=tmp_path / "none.pt"):
        Small()
    assert torch.equal(good.head.bias, torch.ones(4))
    assert fabric.init_report(good).complete


def test_a_file_that_changes_between_opening_and_reading_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state(head__weight=None), path)
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises((CheckpointFormatError, CheckpointMismatchError)) as caught, fabric.init_module(checkpoint=path):
        model = Small()
        os.truncate(path, path.stat().st_size // 2)
    assert str(path) in str(caught.value)
    assert all(is_recorded(parameter) for parameter in model.parameters())
