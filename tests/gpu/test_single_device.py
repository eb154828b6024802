"""One CUDA device: as on the CPU, and nothing goes by way of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, UninitializedTensorError, deferred_init, materialize


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return ""


NO_CUDA = _why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA or "cuda works")]


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.body = nn.TransformerEncoderLayer(width, 2, 4 * width, batch_first=True, dropout=0.0)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("angles", torch.arange(width).float(), persistent=False)
        self.register_buffer("flag", torch.ones(1, dtype=torch.bool))
        nn.init.trunc_normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.embedding(tokens)).mean(1) + self.angles))


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cuda", devices=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def everything(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_the_eager_block_is_lightnings(fabric: Fabric) -> None:
    import lightning

    models = []
    for kind in (lightning.Fabric, Fabric):
        torch.manual_seed(3)
        with kind(accelerator="cuda", devices=1).init_module():
            models.append(Net())
    for one, other in zip(everything(models[0]), everything(models[1]), strict=True):
        assert one.device == other.device
        assert torch.equal(one, other)


def test_a_declared_checkpoint_fills_the_model_on_the_device(fabric: Fabric, checkpoint: Path) -> None:
    with fabric.init_module(checkpoint=checkpoint):
        model = Net()
    assert {tensor.device.type for tensor in everything(model)} == {"cuda"}
    for name, value in torch.load(checkpoint).items():
        assert torch.equal(model.state_dict()[name].cpu(), value), name
    assert model.head.weight is model.embedding.weight
    assert fabric.setup(model)(torch.ones(4, 3, dtype=torch.int64, device="cuda")).isfinite().all()


@pytest.mark.parametrize("complete", ["init_missing", "load_raw", "assign"])
def test_empty_init_on_the_device_is_guarded_until_it_is_complete(
    fabric: Fabric, checkpoint: Path, complete: str
) -> None:
    with fabric.init_module(empty_init=True):
        model = Net()
    handle = fabric.setup(model)
    tokens = torch.ones(4, 3, dtype=torch.int64, device="cuda")
    with pytest.raises(UninitializedTensorError, match=r"norm\.running_mean"):
        handle(tokens)
    if complete == "init_missing":
        fabric.init_missing(handle)
        assert 0.015 < model.embedding.weight.std() < 0.025
    elif complete == "load_raw":
        fabric.load_raw(checkpoint, handle)
    else:
        model.load_state_dict(torch.load(checkpoint, map_location="cuda"), assign=True)
    assert handle(tokens).isfinite().all()
    assert {tensor.device.type for tensor in everything(model)} == {"cuda"}


def test_memory_holds_the_model_once(fabric: Fabric, tmp_path: Path) -> None:
    state = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).state_dict()
    torch.save(state, tmp_path / "m.pt")
    for options in ({"empty_init": True}, {"checkpoint": tmp_path / "m.pt"}):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with fabric.init_module(**options):
            model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
        fabric.init_missing(model)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert torch.cuda.max_memory_allocated() - before < (1 if "checkpoint" in options else 2) * size + (8 << 20)
        del model


def test_moving_an_unfilled_model_neither_fills_it_nor_gets_lost() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = Net()
    model.cuda()
    with pytest.raises(UninitializedTensorError) as caught:
        model(torch.ones(4, 3, dtype=torch.int64, device="cuda"))
    for name in ("norm.running_mean", "flag", "embedding.weight"):
        assert f"  {name}\n" in str(caught.value)
    fabric.init_missing(model)
    assert model.flag.all()
    assert {tensor.device.type for tensor in everything(model)} == {"cuda"}


def test_a_recorded_model_can_be_materialized_on_the_device() -> None:
    with deferred_init():
        model = Net()
    materialize(model, device="cuda")
    assert {tensor.device.type for tensor in everything(model)} == {"cuda"}
    assert torch.equal(model.norm.weight, torch.ones(32, device="cuda"))


def test_the_same_seed_gives_the_same_values_on_the_device_whatever_is_loaded(fabric: Fabric, tmp_path: Path) -> None:
    torch.save({"norm.weight": torch.zeros(32)}, tmp_path / "part.pt")
    models = []
    for options in ({"empty_init": True}, {"checkpoint": tmp_path / "part.pt", "strict": False}):
        torch.manual_seed(4)
        with fabric.init_module(**options):
            models.append(Net())
        fabric.init_missing(models[-1])
    assert torch.equal(models[0].embedding.weight, models[1].embedding.weight)
    assert not torch.equal(models[0].norm.weight, models[1].norm.weight)
