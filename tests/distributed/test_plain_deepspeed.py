"""DeepSpeed without Fabric: ``materialize(model, deepspeed=config)``, then ``deepspeed.initialize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_init import (
    CheckpointMismatchError,
    FabricInitError,
    OptionError,
    RecordingError,
    deferred_init,
    init_report,
    materialize,
)
from tests.sharding.test_packed_weights import Layer, pack
from tests.support.ranks import run_ranks
from tests.support.zoo import MODELS, assert_same, loss_of, one_device, tokens, write_checkpoint

MODEL = "uneven, nothing empty"  # without buffers, which DeepSpeed would not cast


def config_of(stage: int, precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16-true"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
    }


def recorded() -> nn.Module:
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(1 + dist.get_rank())  # all draw what rank 0 draws
    with deferred_init():
        return MODELS[MODEL]()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trained(stage: int, precision: str, path: Path | None, ours: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights when DeepSpeed starts, and after three steps; with DeepSpeed alone if not ``ours``."""
    import deepspeed

    config = config_of(stage, precision)
    if ours:
        model = recorded()
        materialize(model, checkpoint=path, strict=path is None, deepspeed=config)
        statuses = {row.status for row in init_report(model).rows}
        assert statuses >= ({"loaded", "initialized"} if path else {"initialized"})
        partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_tensor")]
        assert len(partitioned) == (len(list(model.parameters())) if stage == 3 else 0)
        assert all(parameter.numel() == 0 for parameter in partitioned)
    else:
        model = one_device(MODEL, seed=1, **({"checkpoint": path, "strict": False} if path else {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    before = gathered(model)
    for step in range(3):
        engine.backward(loss_of(engine, tokens(step)))
        engine.step()
    return before, gathered(model)


def both(**case: Any) -> tuple[Any, Any]:
    found, expected = trained(**case, ours=True), trained(**case, ours=False)
    dist.destroy_process_group()
    return found, expected


CASES = [(1, "32-true", True), (2, "bf16-true", True), (3, "32-true", False), (3, "bf16-true", True)]


@pytest.mark.parametrize(("stage", "precision", "partial"), CASES)
def test_each_stage_starts_and_trains_as_deepspeed_alone_does(
    stage: int, precision: str, partial: bool, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", MODEL, partial=True) if partial else None
    for found, expected in run_ranks(2, both, stage=stage, precision=precision, path=path):
        for after, alone in zip(found, expected, strict=True):
            assert_same(after, alone)


def with_adapters() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all weights, and the adapters that this rank has drawn for itself."""
    model = recorded()
    torch.manual_seed(9 + dist.get_rank())
    adapters = nn.ParameterDict({"a": torch.randn(3, 5), "b": torch.randn(7)})
    drawn = {name: value.detach().clone() for name, value in adapters.items()}
    model.add_module("adapters", adapters)
    materialize(model, deepspeed=config_of(3, "32-true"))
    return gathered(model), drawn


def test_parameters_with_values_are_partitioned_as_deepspeed_does_with_those_of_the_first_rank() -> None:
    (first, drawn), (second, _) = run_ranks(2, with_adapters)
    assert_same(first, second)
    assert_same({name: first[f"adapters.{name}"] for name in drawn}, drawn)


def refused(path: Path, config_path: Path) -> tuple[str, str, bool]:
    import deepspeed

    model = recorded()
    dtypes = {parameter.dtype for parameter in model.parameters()}
    with pytest.raises(CheckpointMismatchError, match="Missing from the checkpoint") as missing:
        materialize(model, checkpoint=path, deepspeed=config_path)
    assert {parameter.dtype for parameter in model.parameters()} == dtypes
    with pytest.raises(OptionError, match='bf16 is "auto"'):
        materialize(model, deepspeed={"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}})
    with pytest.raises(RecordingError, match=r"deepspeed\.zero\.Init does"), deferred_init(), deepspeed.zero.Init():
        nn.Linear(2, 2)
    with pytest.raises(FabricInitError, match="NVMe"):
        materialize(model, deepspeed={"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})
    with pytest.raises(FabricInitError) as broken:
        model(tokens(0))
    with deferred_init():
        layer = Layer()
        pack(layer)
    with pytest.raises(FabricInitError, match="parameters of Packed"):
        materialize(layer, deepspeed=config_path)
    dist.destroy_process_group()
    return str(missing.value), str(broken.value), True


def test_what_is_refused_before_partitioning_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", MODEL, partial=True)
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(config_of(3, "bf16-true")))
    for _, broken, _ in run_ranks(2, refused, path=path, config_path=config):
        assert "Build it anew" in broken


def test_without_process_group_the_error_says_what_to_call(tmp_path: Path) -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
    with pytest.raises(FabricInitError, match="init_distributed"):
        materialize(model, deepspeed=config_of(3, "32-true"))


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_a_configuration_that_cannot_be_read_is_an_error_that_names_the_file(
    content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with deferred_init():
        model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="is no JSON file"):
        materialize(model, deepspeed=path)
