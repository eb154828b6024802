"""GGUF files in models of transformers: bit for bit what ``from_pretrained(gguf_file=…)`` gives, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig, MistralForCausalLM

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Part
from fabric_init.planning.recorded_load import llama_cpp
from tests.support.gguf_files import ARCHITECTURES, as_llama_cpp_would, build, tensors_of, write_gguf, write_tensors
from tests.support.ranks import run_ranks
from tests.support.watched import watched
from tests.support.zoo import launch, weights

BY_TRANSFORMERS = [name for name in ARCHITECTURES if name != "mistral"]
"""For a Mistral's config, transformers 5.23 does not find the names; as a Llama it loads the same file."""


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def from_pretrained(name: str, path: Path, config: Any, dtype: torch.dtype) -> nn.Module:
    model_class = getattr(transformers, ARCHITECTURES[name].model)
    model: nn.Module = model_class.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=dtype)
    return model


def recorded(name: str, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    model_class = getattr(transformers, ARCHITECTURES[name].model)
    with deferred_init():
        model: nn.Module = model_class._from_config(config, dtype=dtype)
    return model


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    assert [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_an_architecture_gets_what_from_pretrained_gives_it(name: str, kind: Type, tmp_path: Path) -> None:
    eager = build(name)
    path = write_gguf(name, eager, tmp_path / "model.gguf", kind)
    dtype = torch.bfloat16 if kind is Type.F16 else torch.float32
    expected = from_pretrained(name, path, eager.config, dtype)
    model = recorded(name, eager.config, dtype)
    materialize(model, checkpoint=path)
    assert_equal(model, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_again_what_it_was_before_llama_cpp(name: str, tmp_path: Path) -> None:
    """So both are right: what was written in float32 comes back, but for norms and logarithms that were rounded."""
    eager = build(name)
    path = write_gguf(name, eager, tmp_path / "model.gguf")
    model = recorded(name, eager.config)
    materialize(model, checkpoint=path)
    for key, tensor in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=2e-6)


def test_the_config_may_be_that_of_the_file(tmp_path: Path) -> None:
    path = write_gguf("llama", build("llama"), tmp_path / "model.gguf", Type.Q4_0)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    model = recorded("llama", config)
    materialize(model, checkpoint=tmp_path)
    assert_equal(model, from_pretrained("llama", path, None, torch.float32))


def test_every_value_code_of_transformers_is_known() -> None:
    """A new release may lay out more architectures: then what it does has to be said here in torch."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    of_no_use = {"GptOssTensorProcessor"}  # under a name that no file has: files say gpt-oss
    with_table = {TENSOR_PROCESSORS[name].__name__ for name in llama_cpp._with_table() & set(TENSOR_PROCESSORS)}
    known = {*llama_cpp._PROCESSED, *of_no_use, *with_table}
    assert {each.__name__ for each in TENSOR_PROCESSORS.values()} <= known


# -- what is around the model, and what the file has beside it ---------------------------------------------------------

LLAMA = LlamaConfig(**{**ARCHITECTURES["llama"].sizes})


def llama_file(folder: Path, **more: Tensor) -> tuple[Path, nn.Module]:
    eager = build("llama")
    fields = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    tensors = tensors_of("llama", eager) | more
    return write_tensors(folder / "model.gguf", "llama", tensors, fields, as_llama_cpp_would(Type.F32)), eager


def test_a_model_in_a_larger_one_takes_the_file_under_its_name(tmp_path: Path) -> None:
    path, eager = llama_file(tmp_path)

    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = LlamaForCausalLM(LLAMA)
            self.score = nn.Linear(3, 1)

    with deferred_init():
        model = Larger()
    materialize(model, checkpoint=path, rename=Part("", into="language."), reinit=["score.*"])
    assert_equal(model.language, eager)


def test_a_model_without_its_head_takes_the_rest(tmp_path: Path) -> None:
    path, eager = llama_file(tmp_path)
    with deferred_init():
        model = LlamaModel(LLAMA)
    with pytest.raises(CheckpointMismatchError, match=r"output\.weight"):
        materialize(model, checkpoint=path)
    materialize(model, checkpoint=path, rename=lambda key: None if key == "output.weight" else key)
    assert_equal(model, eager.model)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapted_model_takes_the_file_into_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    path, eager = llama_file(tmp_path)
    with deferred_init():
        model = get_peft_model(LlamaForCausalLM(LLAMA), LoraConfig(target_modules=["q_proj", "down_proj"]))
    materialize(model, checkpoint=path, rename=Part("", into="base_model.model."), reinit=["*lora_*"])
    assert_equal(model.unload(), eager)


def test_factors_that_the_config_states_are_no_weights(tmp_path: Path) -> None:
    path, eager = llama_file(tmp_path, **{"rope_freqs.weight": torch.ones(8)})
    model = recorded("llama", LLAMA)
    materialize(model, checkpoint=path)
    assert_equal(model, eager)


def test_what_the_model_lacks_or_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    path, _ = llama_file(tmp_path, **{"blk.0.attn_q.bias": torch.ones(64)})
    with pytest.raises(CheckpointMismatchError, match=r"blk\.0\.attn_q\.bias"):
        materialize(recorded("llama", LLAMA), checkpoint=path)
    eager = build("llama")
    tensors = tensors_of("llama", eager)
    del tensors["blk.1.ffn_up.weight"]
    write_tensors(path, "llama", tensors, {}, as_llama_cpp_would(Type.F32))
    with pytest.raises(CheckpointMismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        materialize(recorded("llama", LLAMA), checkpoint=path)


def test_half_of_joined_experts_is_an_error(tmp_path: Path) -> None:
    eager = build("qwen3_moe")
    tensors = tensors_of("qwen3_moe", eager)
    del tensors["blk.1.ffn_up_exps.weight"]
    path = write_tensors(tmp_path / "m.gguf", "qwen3moe", tensors, {}, as_llama_cpp_would(Type.F32))
    with pytest.raises(CheckpointMismatchError, match=r"blk\.1\.ffn_gate_exps\.weight"):
        materialize(recorded("qwen3_moe", eager.config), checkpoint=path)


def test_a_model_of_another_architecture_is_an_error_that_says_both(tmp_path: Path) -> None:
    path, _ = llama_file(tmp_path)
    qwen = build("qwen2")
    with pytest.raises(CheckpointMismatchError, match=r"architecture 'llama', and the model is 'qwen2'.*rename="):
        materialize(recorded("qwen2", qwen.config), checkpoint=path)


def test_an_architecture_that_transformers_does_not_map_is_an_error_or_renamed_by_the_user(tmp_path: Path) -> None:
    config = transformers.OlmoConfig(**ARCHITECTURES["llama"].sizes)
    torch.manual_seed(3)
    eager = transformers.OlmoForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMO, 2)
    tensors = {names.get_name(key, (".weight",)): value for key, value in eager.state_dict().items()}
    path = write_tensors(tmp_path / "m.gguf", "olmo", tensors, {}, as_llama_cpp_would(Type.F32))
    with deferred_init():
        model = transformers.OlmoForCausalLM(config)
    with pytest.raises(CheckpointMismatchError, match=r"architecture 'olmo'.*transformers maps"):
        materialize(model, checkpoint=path)
    back = {names.get_name(key, (".weight",)): key for key in eager.state_dict()}
    materialize(model, checkpoint=path, rename=back.get)
    assert_equal(model, eager)


def test_other_heads_than_those_of_the_file_are_an_error(tmp_path: Path) -> None:
    """Shapes agree, and values would be in another order."""
    path, _ = llama_file(tmp_path)
    config = LlamaConfig(**{**ARCHITECTURES["llama"].sizes, "num_attention_heads": 2, "head_dim": 32})
    with pytest.raises(CheckpointMismatchError, match=r"head_count = 4, and the model's config has num_att.* = 2"):
        materialize(recorded("llama", config), checkpoint=path)


def test_a_mistral_is_a_llama_to_llama_cpp(tmp_path: Path) -> None:
    path, eager = llama_file(tmp_path)
    with deferred_init():
        model = MistralForCausalLM(MistralConfig(**{**ARCHITECTURES["mistral"].sizes}))
    materialize(model, checkpoint=path)
    assert_equal(model, eager)


def test_any_other_model_takes_llama_cpps_names(tmp_path: Path) -> None:
    path = write_tensors(
        tmp_path / "m.gguf",
        "llama",
        {"blk.0.up.weight": torch.ones(3, 2), "blk.0.up.bias": torch.zeros(3)},
        {},
        as_llama_cpp_would(Type.F32),
    )
    with deferred_init():
        model = nn.Linear(2, 3)
    materialize(model, checkpoint=path, rename=Part("blk.0.up."))
    assert model.weight.eq(1).all()


# -- on ranks ----------------------------------------------------------------------------------------------------------

IN_PARTS = ["llama", "qwen3_moe"]
CASES = [("llama", "broadcast"), ("qwen3_5", "local"), *((name, "local") for name in IN_PARTS)]


def on_ranks(paths: dict[str, Path]) -> dict[tuple[str, str], Any]:
    opened = watched()
    found: dict[tuple[str, str], Any] = {}
    for name, io in CASES:
        fabric = launch("fsdp2", io=io)
        config = build(name).config
        opened.clear()
        with fabric.init_module(checkpoint=paths[name]):
            model = getattr(transformers, ARCHITECTURES[name].model)(config)
        before = len(opened[0].parts) if opened else 0
        model = fabric.setup(model)
        kept = sum(parameter.to_local().numel() for parameter in model.parameters())
        read = sum(
            opened[0].spec(key).shape.numel() if region is None else region.numel
            for key, region in (opened[0].parts[before:] if opened else ())
        )
        found[name, io] = {"weights": weights(model), "read": read, "kept": kept}
    return found


def test_two_ranks_hold_what_one_device_holds_and_read_their_parts(tmp_path: Path) -> None:
    """In parts where llama.cpp's layout is undone by views; rows that are put in another order are read whole."""
    paths, expected = {}, {}
    for name, _ in CASES:
        eager = build(name)
        (tmp_path / name).mkdir(exist_ok=True)
        paths[name] = write_gguf(name, eager, tmp_path / name / "model.gguf", Type.Q8_0)
        expected[name] = recorded(name, eager.config)
        materialize(expected[name], checkpoint=paths[name])
    for rank in run_ranks(2, on_ranks, paths=paths):
        for (name, io), found in rank.items():
            for key, tensor in expected[name].state_dict().items():
                assert torch.equal(found["weights"][key], tensor), (name, io, key)
            if name in IN_PARTS and io == "local":
                assert found["read"] <= 1.05 * found["kept"], name
