"""DeepSpeed's own: every stage and offload, the optimizer's fp32 masters, what each rank reads, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from lightning.fabric.accelerators import CUDAAccelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import Fabric, FabricInitError
from fabric_init.checkpoints import Region, Span
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.strategies import DeepSpeedStrategy
from tests.support.ranks import run_ranks, run_ranks_each
from tests.support.zoo import (
    VOCABULARY,
    Transformerish,
    assert_close,
    assert_same,
    build,
    inner,
    launch,
    loss_of,
    one_device,
    runnable,
    tokens,
    weights,
    write_checkpoint,
)

ROWS = 2
STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
OFFLOADED = ["deepspeed_stage_1_offload", "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
OTHERS = ["deepspeed", "deepspeed_stage_1", *OFFLOADED]
NOTHING_STAYS_GATHERED = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
"""By default ZeRO-3 keeps parameters of up to 100,000 elements gathered between steps: every one of the zoo."""


def set_up(
    strategy: str, name: str, precision: str = "32-true", zero: dict[str, Any] | None = None, **options: Any
) -> tuple[Fabric, Any, Any]:
    fabric = launch(strategy, precision)
    fabric.strategy.config["zero_optimization"].update(zero or {})
    model = build(fabric, name, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, made = fabric.setup(model, optimizer)
    return fabric, model, made


def steps(fabric: Fabric, model: Any, optimizer: Any, count: int = 3) -> None:
    for step in range(count):
        mine = tokens(step, ROWS * fabric.world_size)[fabric.global_rank * ROWS :][:ROWS]
        fabric.backward(loss_of(model, mine))
        optimizer.step()
        optimizer.zero_grad()


def one_device_steps(model: nn.Module, world_size: int, count: int = 3) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(count):
        loss_of(model, tokens(step, ROWS * world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def masters(model: Any) -> dict[str, Tensor]:
    """The optimizer's fp32 copy of each trained parameter, put together from all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = inner(model).named_parameters()
    return {name: safe_get_full_fp32_param(value).clone() for name, value in named if value.requires_grad}


def trained_in_fp32(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().float().clone() for name, value in model.named_parameters() if value.requires_grad}


# -- every stage, and what is offloaded --------------------------------------------------------------------------------


def fill_and_train(
    strategy: str, name: str, path: Path, zero: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric, model, optimizer = set_up(strategy, name, zero=zero, checkpoint=path, strict=False)
    filled = weights(model)
    steps(fabric, model, optimizer)
    return filled, weights(model)


@pytest.mark.sweep(*(f"{name}-2" for name in OTHERS), "deepspeed_stage_3_offload-4")
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("strategy", OTHERS)
def test_other_stages_and_offloads_are_filled_and_train_as_one_device(
    strategy: str, world_size: int, tmp_path: Path
) -> None:
    name = runnable("uneven", strategy)
    path = write_checkpoint(tmp_path / "model.safetensors", name, partial=True)
    expected = one_device(name, checkpoint=path, strict=False)
    before, after = weights(expected), one_device_steps(expected, world_size)
    for filled, trained in run_ranks(world_size, fill_and_train, strategy=strategy, name=name, path=path):
        assert_same(filled, before)
        assert_close(trained, after)


ZERO_OPTIONS: dict[str, dict[str, Any]] = {
    "partitioned": NOTHING_STAYS_GATHERED,
    "sub-groups": {"sub_group_size": 50},
    "second copy in pairs": NOTHING_STAYS_GATHERED | {"zero_hpz_partition_size": 2},
}


@pytest.mark.parametrize("option", ZERO_OPTIONS)
@pytest.mark.parametrize("strategy", ["deepspeed_stage_3", "deepspeed_stage_3_offload"])
def test_zero_3_by_other_settings(strategy: str, option: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True)
    expected = one_device("transformerish", checkpoint=path, strict=False)
    before, after = weights(expected), one_device_steps(expected, 4)
    arguments = {"strategy": strategy, "name": "transformerish", "path": path, "zero": ZERO_OPTIONS[option]}
    for filled, trained in run_ranks(4, fill_and_train, **arguments):
        assert_same(filled, before)
        assert_close(trained, after)


def train_with_frozen_parameters(strategy: str, path: Path) -> tuple[dict[str, Tensor], set[str]]:
    fabric = launch(strategy)
    model = build(fabric, "transformerish", checkpoint=path)
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    steps(fabric, model, optimizer)
    return weights(model), {name for name, value in inner(model).named_parameters() if not value.requires_grad}


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_frozen_parameters_stay_as_they_were_loaded(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    model = one_device("transformerish", checkpoint=path)
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    expected = one_device_steps(model, 2)
    for found, frozen in run_ranks(2, train_with_frozen_parameters, strategy=strategy, path=path):
        assert_close(found, expected)
        assert frozen == {name for name, value in model.named_parameters() if not value.requires_grad}


def accumulate(strategy: str, path: Path) -> dict[str, Tensor]:
    fabric = launch(strategy)
    fabric.strategy.config["gradient_accumulation_steps"] = 2
    model = build(fabric, "transformerish", checkpoint=path)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    mine = tokens(0, ROWS * fabric.world_size)[fabric.global_rank * ROWS :][:ROWS]
    for row in mine.split(1):
        fabric.backward(loss_of(model, row))
        optimizer.step()  # takes a step every second time
    return weights(model)


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_gradients_accumulate_by_deepspeeds_own_setting(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    expected = one_device_steps(one_device("transformerish", checkpoint=path), 2, count=1)
    for found in run_ranks(2, accumulate, strategy=strategy, path=path):
        assert_close(found, expected)


class Classifier(nn.Module):
    """A pretrained body, and a new head with an init that no default gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformerish()
        self.head = nn.Linear(VOCABULARY, 3)
        self._init_weights(self.head)

    def _init_weights(self, module: nn.Linear) -> None:
        nn.init.constant_(module.bias, 0.125)
        module.weight.data.normal_(mean=5.0, std=0.01)


def give_it_a_head(strategy: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = launch(strategy)
    torch.manual_seed(1)
    with fabric.init_module(checkpoint=path, strict=False):
        model = Classifier()
    model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return weights(model), masters(model)


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_new_head_gets_the_models_own_init(strategy: str, tmp_path: Path) -> None:
    path = tmp_path / "body.safetensors"
    body = one_device("transformerish", seed=5).state_dict()
    save_file({f"body.{name}": value.clone() for name, value in body.items()}, path)
    for found, fp32 in run_ranks(2, give_it_a_head, strategy=strategy, path=path):
        assert (found["head.bias"] == 0.125).all()
        assert abs(found["head.weight"].mean() - 5.0) < 0.05
        for name in ("head.bias", "head.weight", "body.layers.1.up.weight"):
            assert torch.equal(fp32[name], found[name])
        assert_same({name: found[f"body.{name}"] for name in body}, body)


# -- the optimizer's masters -------------------------------------------------------------------------------------------


def masters_after_setup(
    strategy: str, precision: str, path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], set[torch.dtype]]:
    _, model, _ = set_up(strategy, "transformerish", precision, checkpoint=path, strict=False)
    found = masters(model)
    return weights(model), found, {value.dtype for value in found.values()}


PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-true": torch.float16,
    "16-mixed": torch.float16,
}


def with_precision(precision: str, path: Path) -> nn.Module:
    dtype = PRECISIONS[precision]
    if precision.endswith("true"):
        return one_device("transformerish", dtype=dtype, checkpoint=path, strict=False).to(dtype)
    model = one_device("transformerish", checkpoint=path, strict=False)
    for parameter in model.parameters():  # DeepSpeed casts parameters, and not buffers
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32], ids=["bf16 file", "fp32 file"])
@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_masters_are_the_weights_in_fp32(strategy: str, saved: torch.dtype, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", dtype=saved, partial=True)
    fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # what DeepSpeed asks of a CPU before it takes fp16
    cases = {name: {"precision": name} for name, dtype in PRECISIONS.items() if fp16 or dtype != torch.float16}
    for precision, ranks in run_ranks_each(2, masters_after_setup, cases, strategy=strategy, path=path).items():
        expected = with_precision(precision, path)
        for found, fp32, kinds in ranks:
            assert_same(found, weights(expected))
            assert_same(fp32, trained_in_fp32(expected))
            assert kinds == {torch.float32}


def load_raw_after_setup(
    strategy: str, path: Path, precision: str, how: str, zero: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    fabric, model, optimizer = set_up(strategy, "transformerish", precision, zero=zero, empty_init=True)
    if how == "after a step":
        fabric.init_missing(model)
        steps(fabric, model, optimizer, 1)
        for state in optimizer.optimizer.state.values():  # of the wrapped optimizer: momentum, which no raw file has
            for value in state.values():
                value.zero_() if isinstance(value, Tensor) else None
    fabric.load_raw(path, model)
    loaded, fp32 = weights(model), masters(model)
    steps(fabric, model, optimizer, 1)
    return loaded, fp32, weights(model)


@pytest.mark.parametrize("how", ["at once", "after a step"])
@pytest.mark.parametrize("zero", [{}, NOTHING_STAYS_GATHERED], ids=["gathered", "partitioned"])
@pytest.mark.parametrize("strategy", [*STAGES, "deepspeed_stage_3_offload"])
def test_load_raw_after_setup_reaches_the_masters(
    strategy: str, zero: dict[str, Any], how: str, tmp_path: Path
) -> None:
    if zero and "stage_3" not in strategy:
        zero = {}
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish")
    model = one_device("transformerish", checkpoint=path)
    before, fp32, after = weights(model), trained_in_fp32(model), one_device_steps(model, 2, count=1)
    arguments = {"strategy": strategy, "path": path, "precision": "32-true", "how": how, "zero": zero}
    for loaded, found, trained in run_ranks(2, load_raw_after_setup, **arguments):
        assert_same(loaded, before)
        assert_same(found, fp32)
        assert_close(trained, after)


def load_file_of_this_rank(strategy: str, folder: Path) -> dict[str, Tensor]:
    fabric, model, _ = set_up(strategy, "transformerish", empty_init=True)
    fabric.load_raw(folder / f"{fabric.global_rank}.pt", model)
    return weights(model)


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_load_raw_loads_the_file_that_rank_0_names(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "0.pt", "transformerish")
    torch.save({name: value + 1 for name, value in torch.load(path).items()}, tmp_path / "1.pt")
    for found in run_ranks(2, load_file_of_this_rank, strategy=strategy, folder=tmp_path):
        assert_same(found, weights(one_device("transformerish", checkpoint=path)))


# -- what a rank reads and keeps ---------------------------------------------------------------------------------------


def loads_of_load_raw(strategy: str, path: Path) -> list[bool]:
    fabric, model, _ = set_up(strategy, "transformerish", "32-true", empty_init=True)
    with patch.object(torch, "load", wraps=torch.load) as load:
        fabric.load_raw(path, model)
    return [call.kwargs.get("mmap", False) for call in load.call_args_list]


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_load_raw_maps_the_file_so_that_no_rank_has_a_second_model_in_memory(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish")
    assert run_ranks(2, loads_of_load_raw, strategy=strategy, path=path) == [[True], [True]]


def read_own_slices(path: Path) -> dict[str, Any]:
    regions: list[tuple[Region | None, int]] = []
    plain_read = SafetensorsReader.read

    def read(self: SafetensorsReader, key: str, region: Region | None = None) -> Tensor:
        value = plain_read(self, key, region)
        regions.append((region, value.nbytes))
        return value

    SafetensorsReader.read = read  # type: ignore[method-assign]
    fabric = launch("deepspeed_stage_3")
    with fabric.init_module(checkpoint=path):
        model = Transformerish(width=130, inside=514, depth=2)
    parameters: list[Any] = list(model.parameters())
    model = fabric.setup(model)
    return {
        "only slices": all(isinstance(region, Span) for region, _ in regions),
        "bytes read": sum(size for _, size in regions),
        "bytes kept": sum(parameter.ds_tensor.nbytes for parameter in parameters),
        "gathered": sum(parameter.numel() for parameter in parameters),
        "same objects": all(old is new for old, new in zip(parameters, inner(model).parameters(), strict=True)),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_of_zero_3_reads_and_keeps_its_own_slices_alone(world_size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = Transformerish(width=130, inside=514, depth=2)
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, path)
    shard = sum(value.nbytes for value in state.values()) / world_size
    for found in run_ranks(world_size, read_own_slices, path=path):
        assert found["only slices"]
        assert found["bytes read"] <= 1.05 * shard
        assert found["bytes kept"] <= 1.05 * shard
        assert found["gathered"] == 0
        assert found["same objects"]


# -- checkpoints of DeepSpeed's own ------------------------------------------------------------------------------------


def save_and_load_the_model_alone(
    strategy: str, path: Path, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    fabric = launch(strategy)

    def frozen_in_part(**options: Any) -> Any:
        model = build(fabric, "transformerish", **options)
        for parameter in model.layers[0].parameters():
            parameter.requires_grad_(False)
        return fabric.setup(model, torch.optim.AdamW(model.parameters()))[0]

    fabric.save(folder, {"model": frozen_in_part(checkpoint=path)})
    model = frozen_in_part(empty_init=True)
    fabric.load(folder, {"model": model})
    trained = {name for name, value in inner(model).named_parameters() if value.requires_grad}
    expected = {name: value for name, value in weights(model).items() if name in trained}
    return weights(model), masters(model), expected


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_model_is_loaded_without_its_optimizer_and_with_its_masters(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    saved = weights(one_device("transformerish", checkpoint=path))
    arguments = {"strategy": strategy, "path": path, "folder": tmp_path / "saved"}
    for loaded, fp32, expected in run_ranks(2, save_and_load_the_model_alone, **arguments):
        assert_same(loaded, saved)
        assert_same(fp32, expected)


def save_without_an_optimizer(strategy: str, path: Path, folder: Path) -> str:
    fabric = launch(strategy)
    model = fabric.setup(build(fabric, "transformerish", checkpoint=path))
    with pytest.raises(FabricInitError) as raised:
        fabric.save(folder, {"model": model})
    return str(raised.value)


def test_zero_3_says_that_it_saves_nothing_without_an_optimizer(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    arguments = {"strategy": "deepspeed_stage_3", "path": path, "folder": tmp_path / "saved"}
    for message in run_ranks(2, save_without_an_optimizer, **arguments):
        assert "fabric.setup(model, optimizer)" in message
    assert not (tmp_path / "saved").exists()


# -- errors ------------------------------------------------------------------------------------------------------------


def offload_to_nvme(path: Path) -> str:
    with pytest.raises(FabricInitError) as raised:
        set_up("deepspeed_stage_3_offload_nvme", "transformerish", checkpoint=path)
    return str(raised.value)


def test_parameters_on_nvme_are_refused_on_every_rank(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    for message in run_ranks(2, offload_to_nvme, path=path):
        assert "NVMe" in message
        assert "init_module()" in message


def load_what_does_not_fit(strategy: str, path: Path) -> tuple[str, str, dict[str, Tensor]]:
    fabric, model, _ = set_up(strategy, "transformerish", empty_init=True)
    fabric.init_missing(model)
    with pytest.raises((FabricInitError, RuntimeError)) as raised:
        fabric.load_raw(path, model)
    fabric.load_raw(path, model, strict=False)
    return raised.type.__name__, str(raised.value), weights(model)


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_load_raw_names_keys_that_do_not_fit(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish", partial=True)
    torch.save(torch.load(path) | {"adapter.weight": torch.ones(2)}, path)
    expected = one_device("transformerish")
    expected.load_state_dict(torch.load(path), strict=False)
    for _, message, loaded in run_ranks(2, load_what_does_not_fit, strategy=strategy, path=path):
        assert "layers.1.down.weight" in message
        assert "adapter.weight" in message
        assert_same(loaded, weights(expected))


# -- around DeepSpeed's engine -----------------------------------------------------------------------------------------


def ask_the_engine(strategy: str, path: Path) -> tuple[str, str, list[str]]:
    fabric, model, _ = set_up(strategy, "transformerish", checkpoint=path)
    engine = model._forward_module
    return str(fabric.init_report(model)), str(fabric.init_report(engine)), [type(engine).__name__]


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_the_report_is_found_in_an_engine(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    for of_model, of_engine, kind in run_ranks(2, ask_the_engine, strategy=strategy, path=path):
        assert of_model == of_engine
        assert kind == ["DeepSpeedEngine"]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_can_be_loaded_from_a_file(tmp_path: Path, stage: int) -> None:
    strategy, model = DeepSpeedStrategy(stage=stage), nn.Linear(2, 2)
    torch.save(torch.optim.SGD(model.parameters(), lr=1.0).state_dict(), tmp_path / "optimizer.pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    strategy.load_checkpoint(tmp_path / "optimizer.pt", optimizer)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_file_in_a_checkpoint_of_deepspeed_is_told_to_be_a_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(FileNotFoundError, match=f"using this parent directory instead: {tmp_path}"):
        DeepSpeedStrategy().load_checkpoint(file, {"model": nn.Linear(2, 2)})


def test_devices_that_deepspeed_cannot_number_are_refused_before_it_is_asked_for_its_own() -> None:
    strategy = DeepSpeedStrategy(accelerator=Mock(spec=CUDAAccelerator))
    strategy.parallel_devices = [torch.device("cuda", 1)]
    with pytest.raises(RuntimeError, match=r"device indices .* don't match the local rank values"):
        strategy.setup_environment()
