"""What transformers' ``from_pretrained`` keeps in fp32 (``_keep_in_fp32_modules``), under Lightning's precisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fabric_init import Fabric

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own advice


def t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    torch.save(t5().state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_true_precisions_cast_all_of_it_as_in_lightning(file: Path, precision: str, dtype: torch.dtype) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with fabric.init_module():
        plain = t5()
    plain.load_state_dict(torch.load(file))
    with fabric.init_module(checkpoint=file):
        model = t5()
    expected, found = fabric.setup(plain).state_dict(), fabric.setup(model).state_dict()
    assert {value.dtype for value in found.values()} == {dtype}
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_is_cast_in_the_block_keeps_fp32_and_every_bit_of_the_file(file: Path) -> None:
    assert t5()._keep_in_fp32_modules == {"wo"}
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    with fabric.init_module(checkpoint=file):
        model = t5().to(torch.bfloat16)
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    state = torch.load(file)
    for name, value in fabric.setup(model).state_dict().items():
        kept = ".wo." in name
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(value, state[name] if kept else state[name].bfloat16())
