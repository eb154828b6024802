"""A pass of the whole model: what it says of models that are right and wrong, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from fabric_init import FabricInitError, deferred_init, materialize
from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.measure.probe import examine
from tests.support.recordings import is_recorded
from tests.tools.audit.networks import Classifier, images_and_labels, t5, t5_config


def errors(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.ERROR]


def recorded(build: object) -> nn.Module:
    assert callable(build)
    torch.manual_seed(0)
    with deferred_init():
        model: nn.Module = build()
    return model


def test_t5s_untied_head_comes_first_with_both_losses_and_the_std_that_brings_it_right() -> None:
    _, loss, expected, findings = examine(recorded(t5), ())
    first = findings[0]
    assert expected == pytest.approx(math.log(1000))
    assert (first.level, first.check, first.tensors) == (Level.ERROR, "first-loss", ("lm_head.weight",))
    assert first.loss_before == loss > 5 * expected
    assert first.std == pytest.approx(512**-0.5)
    assert first.loss_after == pytest.approx(expected, rel=0.1)
    assert "variance 5" in first.evidence  # ≈ d_model
    assert errors(findings) == [first]


def test_its_mended_twin_has_no_finding() -> None:
    _, loss, expected, findings = examine(recorded(lambda: t5(fixed=True)), ())
    assert loss == pytest.approx(expected, rel=0.1)
    assert [finding for finding in findings if finding.check == "first-loss"] == []


def test_the_head_that_t5s_config_ties_against_its_will_is_named_as_the_head() -> None:
    findings = examine(recorded(lambda: t.T5ForConditionalGeneration(t5_config())), ())[-1]
    assert findings[0].tensors[:2] == ("lm_head.weight", "shared.weight")
    assert findings[0].loss_after == pytest.approx(math.log(1000), rel=0.1)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SOUND = {
    "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=1000, **SMALL)),
    "Llama, 2048 wide": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(vocab_size=1000, **(SMALL | {"hidden_size": 2048, "num_hidden_layers": 1}))
    ),
    "GPT-2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "BERT, masked words": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=1000, **SMALL)),
    "BERT, sequences": lambda: t.BertForSequenceClassification(t.BertConfig(vocab_size=1000, **SMALL)),
    "GPT-2, sequences": lambda: t.GPT2ForSequenceClassification(
        t.GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "BART": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=1000,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        )
    ),
    "T5, tied": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=1000, num_layers=1, d_ff=64, num_heads=2, d_kv=16)
    ),
    "ViT": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, num_labels=100, **SMALL)),
    "ResNet": lambda: t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=100, image_size=64)
    ),
    "torch's own": lambda: Classifier(),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_have_no_error_and_no_warning(name: str) -> None:
    batch = images_and_labels() if name == "torch's own" else "auto"
    layers, loss, expected, findings = examine(recorded(SOUND[name]), (), batch)
    assert layers
    assert loss is not None
    assert expected is not None
    assert [finding for finding in findings if finding.level > Level.NOTE] == []


def test_an_input_echoed_by_a_tied_embedding_is_only_noted() -> None:
    model = recorded(
        lambda: t.GemmaForCausalLM(
            t.GemmaConfig(vocab_size=1000, head_dim=16, num_key_value_heads=4, **(SMALL | {"hidden_size": 1024}))
        )
    )
    _, loss, expected, findings = examine(model, ())
    assert loss is not None
    assert expected is not None
    assert loss > 1.5 * expected
    assert [(finding.level, finding.check) for finding in findings] == [(Level.NOTE, "echo")]


def test_every_normal_weight_of_a_classifier_is_found_with_its_own_std() -> None:
    _, loss, expected, findings = examine(recorded(lambda: Classifier(std=1.0)), (), images_and_labels())
    stds = {finding.tensors[0]: finding.std for finding in errors(findings)}
    assert stds == {
        "layers.0.weight": pytest.approx(64**-0.5),
        "layers.1.weight": pytest.approx(96**-0.5),
        "layers.2.weight": pytest.approx(96**-0.5),
    }
    for finding in errors(findings):
        assert finding.loss_before == loss
        assert finding.loss_after == pytest.approx(expected, rel=0.1)
        assert "together with" in finding.fix


def test_what_a_finding_proposes_brings_a_model_built_so_right() -> None:
    batch = images_and_labels(classes=2)
    findings = errors(examine(recorded(lambda: Classifier((64, 96, 2), std=1.0)), (), batch)[-1])
    model = Classifier((64, 96, 2), std=1.0)
    for finding in findings:
        assert finding.std is not None
        with torch.no_grad():
            weight = model.get_parameter(finding.tensors[0])
            weight *= finding.std / weight.std()
    after = examine(model, (), batch)
    assert errors(after[-1]) == []
    assert after[1] == pytest.approx(math.log(2), rel=0.25)  # other random numbers than those it was found with


def test_a_loss_that_no_weight_explains_says_so() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            nn.init.constant_(self.layer.bias[0], 100.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    (finding,) = errors(examine(Biased(), (), (torch.randn(8, 8), torch.ones(8, dtype=torch.int64)))[-1])
    assert finding.std is None
    assert "No single weight fixes it" in finding.fix


def test_a_recorded_model_stays_recorded_and_is_materialized_as_if_nothing_had_been() -> None:
    build = lambda: Classifier(std=1.0)  # noqa: E731
    model, same = recorded(build), recorded(build)
    examine(model, (), images_and_labels())
    assert all(is_recorded(parameter) for parameter in model.parameters())
    materialize(model)
    materialize(same)
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_with_values_its_gradients_modes_and_the_generator_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(), nn.Linear(10, 10))
    model[1].eval()
    model(images_and_labels()[0]).sum().backward()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    examine(model, (), images_and_labels())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_pass_twice_gives_the_same_numbers() -> None:
    model = recorded(SOUND["BERT, masked words"])
    assert examine(model, ()) == examine(model, ())


def test_a_loss_of_the_models_own_is_taken() -> None:
    model = recorded(lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=1000, **SMALL)))
    ids = torch.randint(1000, (2, 8), generator=torch.Generator().manual_seed(0))
    _, loss, expected, _ = examine(model, (), {"input_ids": ids, "labels": ids})
    materialize(model)
    with torch.no_grad():
        assert loss == pytest.approx(float(model.eval()(input_ids=ids, labels=ids).loss))
    assert expected == pytest.approx(math.log(1000))


def test_a_model_that_does_not_run_on_the_batch_says_which_batch() -> None:
    with pytest.raises(FabricInitError, match=r"Classifier does not run on the batch \(0: \[2, 3\] torch.float32\)"):
        examine(Classifier(), (), torch.randn(2, 3))


def test_a_model_that_sees_the_labels_is_warned_of() -> None:
    class Leak(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * x

    labels = torch.arange(32) % 10
    findings = examine(Leak(), (), (nn.functional.one_hot(labels, 10).float(), labels))[-1]
    assert [(finding.level, finding.check) for finding in findings] == [(Level.WARNING, "first-loss")]


def test_logits_that_do_not_depend_on_the_input_are_warned_of_unless_they_are_zero() -> None:
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    (warned,) = examine(model, (), images_and_labels())[-1]
    assert (warned.level, warned.check) == (Level.WARNING, "constant-logits")
    nn.init.zeros_(model.bias)
    (noted,) = examine(model, (), images_and_labels())[-1]
    assert (noted.level, noted.check) == (Level.NOTE, "constant-logits")


def test_a_backward_pass_that_fails_names_the_batch_too() -> None:
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise NotImplementedError("no way back")

    class OneWay(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Refusing.apply(super().forward(x))

    with pytest.raises(FabricInitError, match=r"OneWay does not run on the batch .*NotImplementedError: no way back"):
        examine(OneWay(64, 10), (), images_and_labels())
