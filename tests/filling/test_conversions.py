"""Parts and conversions of real checkpoints: models of transformers, saved by transformers, into models that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Fuse, Layers, Part, Split, Stack, Transpose, Unstack
from tests.support.recordings import is_recorded

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
QKV = [f"self_attn.{name}_proj.weight" for name in "qkv"]
GATE_UP = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
TO_PHI3 = [Fuse(QKV, into="self_attn.qkv_proj.weight"), Fuse(GATE_UP, into="mlp.gate_up_proj.weight")]
TO_LLAMA = [
    Split("self_attn.qkv_proj.weight", into=QKV, sizes=[8, 4, 4]),
    Split("mlp.gate_up_proj.weight", into=GATE_UP),
]
EXPERTS_IN = [
    Fuse(["experts.{}.w1.weight", "experts.{}.w3.weight"], into="experts.{}.w13"),
    Stack("experts.{}.w13", into="experts.gate_up_proj"),
    Stack("experts.{}.w2.weight", into="experts.down_proj"),
]
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


def saved(folder: Path, model_class: type, config: Any) -> Any:
    torch.manual_seed(5)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    return model


def loaded(model_class: Any, *arguments: Any, **options: Any) -> Any:
    with deferred_init():
        model = model_class(*arguments)
    materialize(model, **options)
    return model.eval()


def same_answers(one: nn.Module, other: nn.Module) -> bool:
    """Whether they compute the same, but for the last bits: one matmul of three weights sums in another order."""
    with torch.no_grad():
        return torch.allclose(one(TOKENS)[0], other(TOKENS)[0], rtol=1e-5, atol=1e-6)


def llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**LLAMA | options)


def phi3_config() -> Phi3Config:
    return Phi3Config(**LLAMA, rms_norm_eps=1e-6)


def test_llama_is_phi3_when_q_k_v_and_gate_up_are_fused(tmp_path: Path) -> None:
    llama = saved(tmp_path, LlamaForCausalLM, llama_config())
    phi3 = loaded(Phi3ForCausalLM, phi3_config(), checkpoint=tmp_path, convert=TO_PHI3)
    assert same_answers(phi3, llama)
    ours, theirs = phi3.model.layers[0].self_attn, llama.model.layers[0].self_attn
    assert torch.equal(
        ours.qkv_proj.weight, torch.cat([theirs.get_submodule(n).weight for n in ("q_proj", "k_proj", "v_proj")])
    )


def test_phi3_is_llama_when_they_are_split(tmp_path: Path) -> None:
    phi3 = saved(tmp_path, Phi3ForCausalLM, phi3_config())
    llama = loaded(LlamaForCausalLM, llama_config(), checkpoint=tmp_path, convert=TO_LLAMA)
    assert same_answers(llama, phi3)
    one = llama.model.layers[0].self_attn
    assert torch.equal(one.q_proj.weight, phi3.model.layers[0].self_attn.qkv_proj.weight[:8])
    assert one.q_proj.weight.untyped_storage().nbytes() == one.q_proj.weight.nbytes  # not k and v with it


def test_the_experts_of_mixtral_lie_apart_in_files_and_stacked_in_the_model(tmp_path: Path) -> None:
    config = MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)
    mixtral = saved(tmp_path, MixtralForCausalLM, config)
    rename = {r"\.block_sparse_moe\.": ".mlp."}
    found = loaded(MixtralForCausalLM, config, checkpoint=tmp_path, convert=EXPERTS_IN, rename=rename)
    assert same_answers(found, mixtral)
    assert dict(found.named_parameters()).keys() == dict(mixtral.named_parameters()).keys()


def test_stacked_experts_into_a_model_that_has_them_apart(tmp_path: Path) -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = (nn.Linear(*size, bias=False) for size in ((8, 12), (12, 8), (8, 12)))

    config = MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)
    experts = MixtralForCausalLM(config).model.layers[0].mlp.experts.state_dict(prefix="experts.")
    save_file(experts, tmp_path / "experts.safetensors")
    apart = loaded(
        lambda: nn.ModuleList(Expert() for _ in range(3)),
        checkpoint=tmp_path,
        rename=Part("experts."),
        convert=[
            Unstack("gate_up_proj", into="{}.gate_up"),
            Split("gate_up", into=["w1.weight", "w3.weight"]),
            Unstack("down_proj", into="{}.w2.weight"),
        ],
    )
    for index, expert in enumerate(apart):
        both = torch.cat([expert.w1.weight, expert.w3.weight])
        assert torch.equal(both, experts["experts.gate_up_proj"][index])
        assert torch.equal(expert.w2.weight, experts["experts.down_proj"][index])


class Attention(nn.Module):
    """Plain linear layers for q, k, v, as many models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"attn": Attention(), "mlp": Mlp()}) for _ in range(2))


def test_gpt2s_transposed_weights_go_into_linear_layers(tmp_path: Path) -> None:
    gpt2 = saved(tmp_path, GPT2LMHeadModel, GPT2Config(vocab_size=11, n_positions=9, n_embd=8, n_layer=2, n_head=2))
    names = {"c_proj": "out", "c_fc": "up"}

    def rename(key: str) -> str | None:
        key = key.replace("mlp.c_proj", "mlp.down")
        for old, new in names.items():
            key = key.replace(old, new)
        return key if ".attn." in key or ".mlp." in key else None

    body = loaded(
        Body,
        checkpoint=tmp_path,
        convert=[
            Transpose(["c_attn.weight", "c_proj.weight", "c_fc.weight"]),
            Split("c_attn.{}", into=["q.{}", "k.{}", "v.{}"]),
        ],
        rename=[Part("transformer."), rename],
    )
    x = torch.randn(3, 8)
    for block, theirs in zip(body.h, gpt2.transformer.h, strict=True):
        attention = block["attn"]
        ours = torch.cat([attention.q(x), attention.k(x), attention.v(x)], 1)
        assert torch.allclose(ours, theirs.attn.c_attn(x), atol=1e-6)
        assert torch.allclose(attention.out(x), theirs.attn.c_proj(x), atol=1e-6)
        assert torch.allclose(block["mlp"].down(block["mlp"].up(x)), theirs.mlp.c_proj(theirs.mlp.c_fc(x)), atol=1e-5)
        assert attention.q.weight.is_contiguous()


def test_gpt_neox_has_q_k_v_for_each_head(tmp_path: Path) -> None:
    neox = saved(tmp_path, GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES))

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"attention": Attention()}) for _ in range(2))

    heads = loaded(
        Heads,
        checkpoint=tmp_path,
        convert=[Split("query_key_value.{}", into=["q.{}", "k.{}", "v.{}"], groups=4)],
        rename=[
            Part("gpt_neox."),
            lambda key: key.replace(".dense.", ".out.") if ".attention." in key else None,
        ],
    )
    x = torch.randn(3, 8)
    for ours, theirs in zip(heads.layers, neox.gpt_neox.layers, strict=True):
        together = theirs.attention.query_key_value(x).view(3, 4, 3, 2)
        for index, name in enumerate("qkv"):
            one = getattr(ours["attention"], name)(x).view(3, 4, 2)
            assert torch.allclose(one, together[:, :, index], atol=1e-6)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_one_prefix_of_a_larger_checkpoint_is_a_model_of_its_own(tmp_path: Path) -> None:
    llama = saved(tmp_path, LlamaForCausalLM, llama_config())
    body = loaded(LlamaModel, llama_config(), checkpoint=tmp_path, rename=Part("model."))
    assert same_answers(body, llama.model)


def test_a_checkpoint_fills_one_submodule_and_the_rest_is_named(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = LlamaModel(llama_config())
            self.head = nn.Linear(8, 3)

    body = saved(tmp_path, LlamaModel, llama_config())
    into = Part("", into="encoder.")
    model = loaded(Classifier, checkpoint=tmp_path, rename=into, reinit=["head.*"])
    assert same_answers(model.encoder, body)
    with pytest.raises(
        CheckpointMismatchError, match=r"Missing from the checkpoint \(2\):\n  head\.weight\n  head\.bias"
    ):
        loaded(Classifier, checkpoint=tmp_path, rename=into)


def test_every_second_layer_makes_a_smaller_model(tmp_path: Path) -> None:
    llama = saved(tmp_path, LlamaForCausalLM, llama_config(num_hidden_layers=5))
    small = loaded(LlamaForCausalLM, llama_config(num_hidden_layers=3), checkpoint=tmp_path, rename=Layers([0, 2, 4]))
    for one, other in zip(small.model.layers, [llama.model.layers[i] for i in (0, 2, 4)], strict=True):
        mine, theirs = one.state_dict(), other.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_parts_layers_and_conversions_go_together(tmp_path: Path) -> None:
    llama = saved(tmp_path, LlamaForCausalLM, llama_config(num_hidden_layers=3))
    config = phi3_config()
    config.num_hidden_layers = 1
    phi3 = loaded(
        lambda: Phi3ForCausalLM(config).model,
        checkpoint=tmp_path,
        convert=TO_PHI3,
        rename=[Part("model."), Layers([2])],
    )
    theirs = llama.model.layers[2].self_attn
    assert torch.equal(
        phi3.layers[0].self_attn.qkv_proj.weight,
        torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
    )


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_a_tensor_is_made_of(tmp_path: Path) -> None:
    saved(tmp_path, LlamaForCausalLM, llama_config())
    with deferred_init():
        phi3 = Phi3ForCausalLM(phi3_config())
    report = materialize(phi3, checkpoint=tmp_path, convert=TO_PHI3)
    row = next(row for row in report.rows if row.name == "model.layers.0.self_attn.qkv_proj.weight")
    assert row.origin == (
        "model.layers.0.self_attn.qkv_proj.weight (made of model.layers.0.self_attn.q_proj.weight (8, 8), "
        "model.layers.0.self_attn.k_proj.weight (4, 8), model.layers.0.self_attn.v_proj.weight (4, 8))"
    )
    assert "2 tensors made" in str(report)


def test_a_converted_tensor_of_the_wrong_shape_is_named_with_its_sources_before_the_model_is_touched(
    tmp_path: Path,
) -> None:
    saved(tmp_path, LlamaForCausalLM, llama_config())
    with deferred_init():
        phi3 = Phi3ForCausalLM(phi3_config())
    twice = [Fuse([QKV[0], QKV[1]], into="self_attn.qkv_proj.weight"), TO_PHI3[1]]
    with pytest.raises(
        CheckpointMismatchError,
        match=r"qkv_proj\.weight is \(16, 8\) in the model and \(12, 8\) in the checkpoint, made of \S+q_proj\.weight "
        r"\(8, 8\), \S+k_proj\.weight \(4, 8\)",
    ):
        materialize(phi3, checkpoint=tmp_path, convert=twice, rename=lambda key: None if ".v_proj" in key else key)
    assert all(is_recorded(parameter) for parameter in phi3.parameters())


def refused(model_class: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointMismatchError) as caught:
        loaded(model_class, *arguments, **options)
    return str(caught.value)


def test_the_error_proposes_the_conversion_that_then_works(tmp_path: Path) -> None:
    saved(tmp_path, LlamaForCausalLM, llama_config())
    said = refused(Phi3ForCausalLM, phi3_config(), checkpoint=tmp_path)
    fuse = "convert=[Fuse(['q_proj.weight', 'k_proj.weight', 'v_proj.weight'], into='qkv_proj.weight')]"
    assert fuse in said
    assert "makes 2 of 4 missing tensors" in said
    fused = [Fuse([f"{name}_proj.weight" for name in "qkv"], into="qkv_proj.weight")]
    said = refused(Phi3ForCausalLM, phi3_config(), checkpoint=tmp_path, convert=fused)
    assert "into='gate_up_proj.weight')] makes all 2 missing tensors" in said


def test_the_error_proposes_the_conversion_under_a_prefix_that_is_missing_too(tmp_path: Path) -> None:
    phi3 = saved(tmp_path, Phi3ForCausalLM, phi3_config())
    save_file(phi3.model.state_dict(prefix="net.language."), tmp_path / "model.safetensors")
    said = refused(LlamaModel, llama_config(), checkpoint=tmp_path)
    assert r'rename={r"^net\.language\.": ""} would match' in said
    assert "into=['q_proj.weight', 'k_proj.weight', 'v_proj.weight'], sizes=[8, 4, 4])]" in said


def test_a_base_model_takes_its_part_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    whole = saved(tmp_path, LlamaForCausalLM, llama_config())
    said = refused(LlamaModel, llama_config(), checkpoint=tmp_path)
    assert "20 of 20 tensors match" in said
    assert "Not in the model (1):\n  lm_head.weight" in said
    for options in ({"strict": False}, {"rename": Part("model.")}):
        model = loaded(LlamaModel, llama_config(), checkpoint=tmp_path, **options)
        assert torch.equal(model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)


def test_the_error_proposes_to_transpose(tmp_path: Path) -> None:
    gpt2 = saved(tmp_path, GPT2LMHeadModel, GPT2Config(vocab_size=11, n_positions=9, n_embd=8, n_layer=1, n_head=2))
    names = {
        "c_fc.weight": "up.weight",
        "c_fc.bias": "up.bias",
        "c_proj.weight": "down.weight",
        "c_proj.bias": "down.bias",
    }
    mlp = {names[name]: tensor for name, tensor in gpt2.transformer.h[0].mlp.state_dict().items()}
    save_file(mlp, tmp_path / "model.safetensors")
    said = refused(Mlp, checkpoint=tmp_path)
    assert "Likely: convert=[Transpose(['up.weight', 'down.weight'])], in the names of the checkpoint." in said
    turned = loaded(Mlp, checkpoint=tmp_path, convert=[Transpose(["up.weight", "down.weight"])])
    assert torch.equal(turned.up.weight, mlp["up.weight"].t())
