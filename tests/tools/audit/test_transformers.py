"""No crying wolf: what transformers builds is sound but for a few known places, and those are what is found."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from fabric_init import audit
from fabric_init.tools.audit.findings import Level
from fabric_init.tools.audit.report import AuditReport
from tests.support import architectures

# A model class of each architecture, and what is rightly warned of.
MODELS: dict[str, tuple[str, set[str]]] = {
    "llama": ("LlamaForCausalLM", set()),
    "gpt2": ("GPT2LMHeadModel", set()),
    "vit": ("ViTForImageClassification", set()),
    "resnet": ("ResNetForImageClassification", set()),
    "bert": ("BertForMaskedLM", set()),
    "t5": ("T5ForConditionalGeneration", set()),
    "opt": ("OPTForCausalLM", set()),
    "mixtral": ("MixtralForCausalLM", set()),
    "swin": ("SwinForImageClassification", set()),
    "clip": ("CLIPModel", set()),
    "whisper": ("WhisperForConditionalGeneration", set()),
    "mamba": ("MambaForCausalLM", set()),
    # its position embeddings and class token: drawn, and then zeroed a few lines further down
    "deit": ("DeiTForImageClassification", {"deit.embeddings.cls_token", "deit.embeddings.position_embeddings"}),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers logs what it thinks of token ids beyond a small vocabulary."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def audited(name: str, class_name: str) -> AuditReport:
    """An audit of the smallest model of the class that can be built."""
    found = [one for one in architectures.model_classes(f"{name}/modeling_{name}") if one.__name__ == class_name]
    model_class: Any = found[0]
    for config in architectures.configs(model_class):
        made = config()
        try:
            return audit(lambda made=made: model_class(made))
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            continue  # too small for this architecture
    raise AssertionError(f"{class_name} cannot be built small")


@pytest.mark.parametrize("name", MODELS)
def test_no_error_and_no_warning_but_the_known_ones(name: str) -> None:
    class_name, known = MODELS[name]
    report = audited(name, class_name)
    serious = [finding for finding in report.findings if finding.level > Level.NOTE]
    assert {tensor for finding in serious for tensor in finding.tensors} == known, str(report)
    assert report.count(Level.ERROR) == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_a_rule_a_place_and_a_standard_deviation(name: str) -> None:
    for row in audited(name, MODELS[name][0]).rows:
        assert row.rule, row.name
        assert row.place or row.rule == "set when built", row.name
        assert row.std is not None, row.name


def test_csms_head_is_initialized_once_for_each_codebook() -> None:
    report = audited("csm", "CsmDepthDecoderForCausalLM")
    (found,) = (finding for finding in report.findings if finding.level > Level.NOTE)
    assert (found.check, found.tensors) == ("written-more-than-once", ("codebooks_head.weight",))


def test_a_shape_of_70_billion_parameters_is_audited_without_their_memory() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = audit(lambda: LlamaForCausalLM(config))
    assert sum(row.elements for row in report.rows) > 70e9
    assert report.wasted_elements > 70e9  # each is initialized by torch, and then by the model
    assert {finding.level for finding in report.findings} == {Level.NOTE}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500e6
