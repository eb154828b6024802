"""Every way to name a model on the command line, and what is said about the wrong ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fabric_init.cli import CommandError
from fabric_init.cli.model_argument import model_builder

MODELS = """
from torch import nn
class Factories:
    small = staticmethod(lambda: nn.Linear(3, 4))
def build(): return nn.Linear(3, 4)
def needs(width): return nn.Linear(3, width)
def number(): return 3
def raises(): raise RuntimeError("no such\\nwidth")
built = nn.Linear(1, 1)
width = 3
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 11,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that is not on ``sys.path``, with modules whose names no other test has."""
    (tmp_path / "models_to_name.py").write_text(MODELS)
    (tmp_path / "models_that_need.py").write_text("import a_library_that_is_not_there")
    (tmp_path / "models_misspelt.py").write_text("def build(:\n    pass\n")
    (tmp_path / "models_that_raise.py").write_text("width = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("models_to_name", None)


@pytest.mark.parametrize("argument", ["models_to_name:build", "models_to_name:Factories.small"])
def test_a_callable_is_found_in_the_working_folder(here: Path, argument: str) -> None:
    assert isinstance(model_builder(argument)(), torch.nn.Linear)


@pytest.mark.parametrize("argument", [".", "config.json"])
def test_a_config_names_the_class_to_build(here: Path, argument: str) -> None:
    (here / "config.json").write_text(json.dumps(LLAMA))
    model = model_builder(argument)()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_parameter("lm_head.weight").shape == (11, 8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("models_to_name:needs", r"needs arguments \(width\): name a function without any"),
        ("models_to_name:width", "is of type int, which builds no model"),
        ("models_to_name:built", "is built already"),
        ("models_to_name:absent", "models_to_name has no attribute 'absent'"),
        ("models_not_there:build", "no module 'models_not_there'"),
        ("models_that_need:build", "cannot be imported: No module named 'a_library_that_is_not_there'"),
        ("models_misspelt:build", r"cannot be imported: SyntaxError: invalid syntax \(models_misspelt.py, line 1\)$"),
        ("models_that_raise:build", r"ZeroDivisionError: division by zero \(raised at .*models_that_raise.py:1\)$"),
        ("models_to_name", "no such folder, and no package.module:callable"),
        (".", "no config.json in this folder"),
    ],
)
def test_a_wrong_name_is_explained(here: Path, argument: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        model_builder(argument)


def test_a_callable_that_returns_no_module_is_explained(here: Path) -> None:
    build = model_builder("models_to_name:number")
    with pytest.raises(CommandError, match=r"returned a value of type int, not a torch\.nn\.Module"):
        build()


def test_what_a_callable_raises_is_one_line_with_its_place(here: Path) -> None:
    build = model_builder("models_to_name:raises")
    with pytest.raises(CommandError, match=r"does not build: RuntimeError: no such width \(raised at .*models_to_name"):
        build()


def test_a_config_that_its_class_refuses_is_one_line(here: Path) -> None:
    (here / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "none such"}))
    with pytest.raises(CommandError, match=r"config.json does not build: KeyError: .*none such") as refused:
        model_builder(".")()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a Hugging Face config"),
        ("[]", "not a Hugging Face config"),
        ('{"model_type": "llama"}', 'name the model class in it: "architectures"'),
        ('{"architectures": ["MyOwnModel"]}', "has no model class 'MyOwnModel'"),
        (json.dumps(LLAMA | {"num_hidden_layers": "two"}), "transformers cannot read it"),
    ],
)
def test_a_config_that_builds_nothing_is_explained(here: Path, config: str, message: str) -> None:
    (here / "config.json").write_text(config)
    with pytest.raises(CommandError, match=message):
        model_builder(".")
