"""torchao on recorded models: quantized in the block or after it, from a float checkpoint, a quantized one or scratch.

What counts is the model that plain PyTorch gives: build it, ``load_state_dict``, and quantize it then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fabric_init import deferred_init, init_missing, materialize
from fabric_init.checkpoints import open_checkpoint
from fabric_init.errors import CheckpointMismatchError, UninitializedTensorError
from tests.support.ranks import run_ranks

float8 = pytest.importorskip("torchao.float8")
quantization = pytest.importorskip("torchao.quantization")
qat = pytest.importorskip("torchao.quantization.qat")
nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")

pytestmark = pytest.mark.filterwarnings(
    "ignore:The argument 'device' of Tensor.is_pinned:DeprecationWarning"  # of torch, in torchao's float8 weights
)

Change = Callable[[nn.Module], Any]
TOKENS = torch.arange(32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 128)
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128, bias=False)
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(self.embedding(tokens)).relu())))


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


def quantized(config: str, **options: Any) -> Change:
    return lambda model: quantization.quantize_(model, getattr(quantization, config)(**options))


def embeddings_too(model: nn.Module) -> None:
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    quantization.quantize_(model, config, filter_fn=lambda each, name: isinstance(each, (nn.Linear, nn.Embedding)))


def each_its_own(model: nn.Module) -> None:
    its = {"up": quantization.Int8WeightOnlyConfig(version=2), "down": quantization.Float8WeightOnlyConfig()}
    quantization.quantize_(model, quantization.FqnToConfig(its), filter_fn=None)


def in_nf4(model: nn.Module) -> None:
    for layer in (model.up, model.down):
        layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 4), requires_grad=False)


def float8_training(*, all_gather: bool = False) -> Change:
    config = float8.Float8LinearConfig(enable_fsdp_float8_all_gather=all_gather)
    return lambda model: float8.convert_to_float8_training(
        model, config=config, module_filter_fn=lambda each, name: name != "head"
    )


def prepared_for_qat(model: nn.Module) -> None:
    base = quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)
    quantization.quantize_(model, qat.QATConfig(base, step="prepare"))


int8 = quantized("Int8WeightOnlyConfig", version=2)
CHANGES: dict[str, Change] = {
    "int8 weights": int8,
    "int8 weights and activations": quantized("Int8DynamicActivationInt8WeightConfig", version=2),
    "float8 weights": quantized("Float8WeightOnlyConfig"),
    "intx, embeddings too": embeddings_too,
    "int4 in groups": quantized("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4),
    "each layer its own": each_its_own,
    "cast before": lambda model: int8(model.bfloat16()),
    "cast after": lambda model: (int8(model), model.bfloat16()),
    "copied": lambda model: (int8(model), setattr(model, "twin", copy.deepcopy(model.down))),
    "NF4": in_nf4,
    "float8 training": float8_training(),
    "float8 training, all-gather in float8": float8_training(all_gather=True),
    "QAT": prepared_for_qat,
}
SHOWS_VALUES = ("NF4",)
"""Computes with real tensors beside the weights, which only the block records."""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Model().state_dict()


@pytest.fixture(scope="module")
def path(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(state, path)
    return path


def eager(change: Change, state: dict[str, Tensor] | None = None, kind: type[nn.Module] = Model) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    if state is not None:
        model.load_state_dict(state)
    change(model)
    return model


def recorded(change: Change, *, inside: bool = True, kind: type[nn.Module] = Model) -> nn.Module:
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        model = kind()
        if inside:
            change(model)
    if not inside:
        change(model)
    return model


def leaves(tensor: Tensor, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a tensor, or the tensors inside it, are, in comparable values."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    yield name, (type(tensor), tensor.requires_grad, tensor.device)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        yield f"{name}, context", str(context)
        for each in names:
            yield from leaves(getattr(tensor, each), f"{name}.{each}")
    else:
        layout = tensor.shape, tensor.stride(), tensor.dtype
        yield f"{name}, values", (layout, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())


def content(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(leaf for name, tensor in tensors for leaf in leaves(tensor, name))


def assert_same(model: nn.Module, wanted: nn.Module) -> None:
    found, expected = content(model), content(wanted)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    with torch.no_grad():
        assert torch.equal(model(TOKENS), wanted(TOKENS))


# -- as plain PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["in the block", "after it"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_float_checkpoint_is_quantized_as_if_it_had_been_loaded_before(
    name: str, inside: bool, path: Path, state: dict[str, Tensor]
) -> None:
    if not inside and name in SHOWS_VALUES:
        with pytest.raises(UninitializedTensorError, match=r"up\.weight"):
            recorded(CHANGES[name], inside=False)
        return
    model = recorded(CHANGES[name], inside=inside)
    materialize(model, checkpoint=path)
    assert_same(model, eager(CHANGES[name], state))


@pytest.mark.parametrize("inside", [True, False], ids=["in the block", "after it"])
@pytest.mark.parametrize("name", CHANGES)
def test_from_scratch_the_models_own_init_is_quantized(name: str, inside: bool) -> None:
    if not inside and name in SHOWS_VALUES:
        return  # said above
    model = recorded(CHANGES[name], inside=inside)
    materialize(model)
    assert_same(model, eager(CHANGES[name]))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("lacking", [None, "head.weight", "embedding.weight"])
def test_a_tied_embedding_stays_as_it_is_beside_a_quantized_head(
    inside: bool, lacking: str | None, tmp_path: Path
) -> None:
    state = eager(lambda model: None, kind=Tied).state_dict()
    torch.save({name: value for name, value in state.items() if name != lacking}, tmp_path / "model.pt")
    model = recorded(int8, inside=inside, kind=Tied)
    materialize(model, checkpoint=tmp_path / "model.pt")
    assert_same(model, eager(int8, state, Tied))


@pytest.mark.parametrize("inside", [True, False])
def test_what_the_checkpoint_lacks_is_initialized_and_quantized(
    inside: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    part = {name: value for name, value in state.items() if not name.startswith("up.")}
    save_file(part, tmp_path / "part.safetensors")
    wanted = eager(lambda model: (model.load_state_dict(part, strict=False), int8(model)))
    model = recorded(int8, inside=inside)
    report = materialize(model, checkpoint=tmp_path / "part.safetensors", strict=False)
    assert_same(model, wanted)
    rows = {row.name: row for row in report.rows}
    assert [rows[name].status for name in ("up.weight", "down.weight")] == ["initialized", "loaded"]
    assert all("Int8Tensor" in rows[name].origin for name in ("up.weight", "down.weight"))


def test_parameters_stay_the_same_objects(path: Path) -> None:
    model = recorded(int8)
    before = dict(model.named_parameters())
    materialize(model, checkpoint=path)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_init_missing_quantizes_the_models_own_init() -> None:
    for inside in (True, False):
        model = recorded(int8, inside=inside)
        init_missing(model)
        assert_same(model, eager(int8))


# -- quantized checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("form", ["torch.save", "safetensors"])
@pytest.mark.parametrize("name", ["int8 weights", "float8 weights", "int4 in groups"])
def test_a_quantized_checkpoint_is_loaded_as_it_is(
    name: str, form: str, inside: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    wanted = eager(CHANGES[name], state)
    saved = save_quantized(wanted, form, tmp_path)
    model = recorded(CHANGES[name], inside=inside)
    materialize(model, checkpoint=saved)
    assert_same(model, wanted)


def save_quantized(model: nn.Module, form: str, folder: Path) -> Path:
    if form == "torch.save":
        torch.save(model.state_dict(), folder / "quantized.pt")
        return folder / "quantized.pt"
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    tensors, metadata = support.flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, folder / "quantized.safetensors", metadata=metadata)
    return folder / "quantized.safetensors"


def test_a_quantized_checkpoint_for_another_quantization_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    saved = save_quantized(eager(CHANGES["int4 in groups"], state), "torch.save", tmp_path)
    with pytest.raises(CheckpointMismatchError, match="_weight_scale is"):
        materialize(recorded(int8), checkpoint=saved)
    with pytest.raises(CheckpointMismatchError, match="quantized"):
        materialize(recorded(lambda model: None), checkpoint=saved)


def test_load_state_dict_takes_what_it_takes_in_plain_pytorch(state: dict[str, Tensor]) -> None:
    wanted = eager(int8, state)
    model = recorded(int8)
    with pytest.raises(RuntimeError, match=r"up\.weight"):
        model.load_state_dict(state)
    model = recorded(int8)
    model.load_state_dict(wanted.state_dict())
    assert_same(model, wanted)
    part = {name: value for name, value in wanted.state_dict().items() if not name.startswith("up.")}
    wanted = eager(int8)
    for each in (wanted, model := recorded(int8)):
        each.load_state_dict(part, strict=False)
    assert_same(model, wanted)


# -- refused by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_a_quantized_model_refuses_to_run_before_it_has_values(inside: bool) -> None:
    model = recorded(int8, inside=inside)
    with pytest.raises(UninitializedTensorError, match=r"up\.weight"):
        model(TOKENS)
    with pytest.raises(UninitializedTensorError, match=r"up\.weight"):
        model.up.weight.dequantize().sum().item()


def test_a_decision_by_values_while_quantizing_holds_for_the_checkpoint_or_the_load_is_refused(tmp_path: Path) -> None:
    def one_layer() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 4, bias=False))  # each of many steps is computed again to compare

    config = {"weight_dtype": torch.int4, "intx_choose_qparams_algorithm": "hqq_scale_only"}
    hqq = quantized("IntxWeightOnlyConfig", **config)
    torch.save({"0.weight": torch.randn(4, 32)}, tmp_path / "layer.pt")
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        hqq(model := one_layer())
    with pytest.raises(CheckpointMismatchError, match="looked at values"):
        materialize(model, checkpoint=tmp_path / "layer.pt")
    materialize(model)
    torch.manual_seed(0)
    hqq(wanted := one_layer())
    assert content(model) == content(wanted)
    with deferred_init():
        model = one_layer()
    with pytest.raises(UninitializedTensorError, match=r"0\.weight"):
        hqq(model)


def test_float_weights_for_a_layer_that_is_quantized_with_values_are_refused(path: Path) -> None:
    real = eager(int8)
    with deferred_init():
        model = Model()
        model.up = real.up
    with pytest.raises(CheckpointMismatchError, match=r"up\.weight.*Int8Tensor"):
        materialize(model, checkpoint=path)


# -- on ranks ----------------------------------------------------------------------------------------------------------


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)


def sharded_here(change: Change, checkpoint: Path) -> list[str]:
    """Return the names of what is wrong on this rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    state = open_checkpoint(checkpoint)
    wanted = eager(change, {name: state.read(name) for name in state.keys()})
    model = recorded(change)
    for each in (wanted, model):
        shard(each)
    materialize(model, checkpoint=checkpoint)
    found, expected = content(model), content(wanted)
    return [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]


def on_two_ranks(checkpoint: Path) -> dict[str, list[str]]:
    changes = {"NF4": in_nf4, "float8": float8_training(), "all-gather": float8_training(all_gather=True)}
    return {name: sharded_here(change, checkpoint) for name, change in changes.items()}


def test_fsdp2_shards_quantized_and_float8_models_before_they_have_values(path: Path) -> None:
    assert run_ranks(2, on_two_ranks, checkpoint=path) == [{"NF4": [], "float8": [], "all-gather": []}] * 2
