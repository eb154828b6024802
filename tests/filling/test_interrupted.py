"""A fill that fails half way: a clear error, no half-filled model that can be used, and a process that can go on."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import (
    CheckpointError,
    CheckpointFormatError,
    Fabric,
    OutOfMemoryError,
    UninitializedTensorError,
    deferred_init,
    materialize,
)
from fabric_init.checkpoints import (
    CheckpointReader,
    Region,
    SafetensorsReader,
    TorchFileReader,
    register_reader,
    unregister_reader,
)
from tests.support.recordings import is_recorded

WIDTH = 100
State = dict[str, Tensor]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def good_state() -> State:
    torch.manual_seed(5)
    return {key: torch.randn_like(value) for key, value in Model().state_dict().items()}


class Frail:
    """A reader of files ``*.frail`` that lets something happen before its third read."""

    def __init__(self, reader: CheckpointReader, mishap: Callable[[Path], object]) -> None:
        self._reader, self._mishap, self._reads = reader, mishap, 0
        self.path, self.format, self.note = reader.path, reader.format, reader.note
        self.keys, self.spec = reader.keys, reader.spec

    def read(self, key: str, region: Region | None = None) -> Tensor:
        self._reads += 1
        if self._reads == 3:
            assert isinstance(self.path, Path)
            self._mishap(self.path)
        return self._reader.read(key, region)


def disk_error(path: Path) -> None:
    raise OSError(5, "Input/output error", str(path))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, (1, 1))


def no_memory(path: Path) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def no_memory_for_python(path: Path) -> None:
    bytearray(2**62)


def press_ctrl_c(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)


MISHAPS: dict[Callable[[Path], object], tuple[type[BaseException], str]] = {
    disk_error: (CheckpointError, r"model\.frail: 'layers\.1\.\w+' cannot be read: .*Input/output error"),
    cut_short: (CheckpointFormatError, r"model\.frail changed after it was opened"),
    rewrite: (CheckpointFormatError, r"model\.frail changed after it was opened"),
    no_memory: (OutOfMemoryError, r"out of memory after 2 of 6 tensors .*allocate"),
    no_memory_for_python: (OutOfMemoryError, r"out of memory after 2 of 6 tensors"),
    press_ctrl_c: (KeyboardInterrupt, "^$"),
}


@pytest.fixture
def mishap(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], object]]:
    def opens(path: Path, *, mmap: bool) -> Frail:
        with path.open("rb") as file:
            kind = TorchFileReader if file.read(2) == b"PK" else SafetensorsReader
        return Frail(kind(path, mmap=mmap), request.param)

    register_reader("frail", lambda candidate: candidate.path.suffix == ".frail", opens)
    yield request.param
    unregister_reader("frail")


def held() -> tuple[int, list[str]]:
    """Open files and running threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())


def refuses_to_be_used(model: nn.Module) -> None:
    for use in (lambda: model(torch.ones(1, WIDTH)), lambda: torch.save(model.state_dict(), BytesIO())):
        with pytest.raises(UninitializedTensorError, match=r"\w+ cannot (run|be used by|be pickled)"):
            use()


def same_bits(model: nn.Module, state: State) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def fails(mishap: Callable[[Path], object], fill: Callable[[], object]) -> None:
    kind, message = MISHAPS[mishap]
    with pytest.raises(kind, match=message) as caught:
        fill()
    assert caught.type is kind


every_mishap = pytest.mark.parametrize("mishap", MISHAPS, ids=lambda mishap: mishap.__name__, indirect=True)
every_format = pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
mapped_or_not = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "copied"])


@every_mishap
@every_format
@mapped_or_not
def test_materialize(tmp_path: Path, mishap: Callable[[Path], object], save: Callable[..., None], mmap: bool) -> None:
    state = good_state()
    save(state, tmp_path / "model.frail")
    save(state, tmp_path / "model.pt" if save is torch.save else tmp_path / "model.safetensors")
    with deferred_init():
        model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    before = held()
    fails(mishap, lambda: materialize(model, checkpoint=tmp_path / "model.frail", mmap=mmap))
    assert held() == before
    refuses_to_be_used(model)
    (tmp_path / "model.frail").unlink()
    materialize(model, checkpoint=tmp_path, mmap=mmap)
    same_bits(model, state)
    assert optimizer.param_groups[0]["params"][0] is model.layers[0].weight


@every_mishap
def test_init_module(tmp_path: Path, mishap: Callable[[Path], object]) -> None:
    state = good_state()
    save_file(state, tmp_path / "model.frail")
    save_file(state, tmp_path / "model.safetensors")
    fabric = Fabric(accelerator="cpu", devices=1)
    models = []

    def build(name: str) -> None:
        with fabric.init_module(checkpoint=tmp_path / name):
            models.append(Model())

    before = held()
    fails(mishap, lambda: build("model.frail"))
    assert held() == before
    refuses_to_be_used(models[0])
    build("model.safetensors")
    same_bits(fabric.setup(models[1]), state)
    materialize(models[0], checkpoint=tmp_path / "model.safetensors")
    same_bits(models[0], state)


def test_a_block_that_fails_leaves_what_had_values_before_as_it_was(tmp_path: Path) -> None:
    state = good_state()
    save_file(state, tmp_path / "model.safetensors")
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(checkpoint=tmp_path / "model.safetensors"):
        model = Model()
    whole = []
    with pytest.raises(KeyboardInterrupt), fabric.init_module(empty_init=True):
        whole.append(nn.Sequential(model, nn.Linear(WIDTH, 2)))
        os.kill(os.getpid(), signal.SIGINT)
    same_bits(model, state)
    model(torch.ones(1, WIDTH))
    with pytest.raises(UninitializedTensorError, match="Its init_module block ended with an error"):
        whole[0](torch.ones(1, WIDTH))


class TooLarge(nn.Module):
    """Its parameters are nothing; what its own code computes at once is more than any machine has."""

    def __init__(self, built: list[nn.Module]) -> None:
        super().__init__()
        built.append(self)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(1 << 44, dtype=torch.float32) * 2, persistent=False)


def test_a_model_that_is_too_large_says_so_when_it_gets_memory_and_harms_no_other() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    built: list[Any] = []
    with fabric.init_module(empty_init=True):
        first = nn.Linear(2, 2)
        TooLarge(built)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="allocate"):
            fabric.init_missing(built[0])
    with pytest.raises(UninitializedTensorError, match="neither loaded nor initialized"):
        first(torch.ones(1, 2))
    first.load_state_dict(nn.Linear(2, 2).state_dict())  # it goes on waiting for its load
    assert first(torch.ones(1, 2)).isfinite().all()


class Wide(nn.Module):
    """Its own init takes a while, in threads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(700, 700) for _ in range(12))


def test_ctrl_c_at_any_moment_leaves_a_model_that_has_all_values_or_cannot_be_used() -> None:
    torch.manual_seed(1)
    with deferred_init():
        expected = Wide()
    materialize(expected)
    state = expected.state_dict()
    before, refused = held(), 0
    for number in range(8):
        torch.manual_seed(1)
        with deferred_init():
            model = Wide()
        timer = threading.Timer(0.006 * number, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            materialize(model)
            time.sleep(10)
        timer.join()
        if any(is_recorded(parameter) for parameter in model.parameters()):
            assert all(is_recorded(parameter) for parameter in model.parameters())
            refused += 1
            refuses_to_be_used(model)
            materialize(model)
        same_bits(model, state)
    assert held() == before
    assert refused
