"""Each private name of torch and Lightning that we need exists: if one is gone, its test says who needs it.

This file imports nothing of ours, which would fail at the first name that is gone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch.strategies
import pytest
import torch
from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

PACKAGE = Path(__file__).parents[1] / "src" / "fabric_init"
INTERNALS = ("_torch_internals", "_dtensor_internals", "_lightning_internals")


class Needed(NamedTuple):
    """A line such as ``conj_view = torch._conj`` and the comment above it."""

    ours: str
    theirs: str
    comment: str
    module: str

    @property
    def library(self) -> str:
        return self.theirs.partition(".")[0]


def needed(module: str) -> Iterator[Needed]:
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            ours = node.targets[0] if isinstance(node, ast.Assign) else node.target
            above = source.splitlines()[node.lineno - 2]
            yield Needed(ast.unparse(ours), ast.unparse(node.value), above, module)


def users(name: Needed) -> list[str]:
    """The files that import the name."""
    line = re.compile(rf"from fabric_init\.{name.module} import (\([^)]*\b|.*\b){name.ours}\b")
    return [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if line.search(path.read_text(encoding="utf-8"))
    ]


def resolve(dotted: str) -> Any:
    """Return what ``torch.utils._device`` names: a module, or something in one."""
    top, *rest = dotted.split(".")
    found, path = import_module(top), top
    for part in rest:
        path += f".{part}"
        found = getattr(found, part) if hasattr(found, part) else import_module(path)
    return found


def require(dotted: str, files: list[str]) -> None:
    """Fail with the files that need a name if it is gone."""
    try:
        resolve(dotted)
    except (AttributeError, ImportError):
        library = installed(dotted.partition(".")[0])
        pytest.fail(f"{library} has no {dotted}, needed by {', '.join(files)}", pytrace=False)


def installed(library: str) -> str:
    return f"{library} {import_module(library).__version__}"


NAMES = [name for module in INTERNALS for name in needed(module)]


@pytest.mark.parametrize("name", NAMES, ids=[name.theirs for name in NAMES])
def test_private_name_exists(name: Needed) -> None:
    require(name.theirs, users(name))


@pytest.mark.parametrize("name", NAMES, ids=[name.theirs for name in NAMES])
def test_private_name_is_used_and_says_what_for_and_where_it_was_checked(name: Needed) -> None:
    assert users(name), f"nothing imports {name.ours}: delete it from {name.module}.py"
    assert re.fullmatch(rf"# [A-Z].+\. Checked on {name.library} \d+\.\d+\.\d+\.", name.comment), name.comment


def test_a_name_that_is_gone_is_named_with_the_files_that_need_it() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"torch 2.* has no torch\._C\._gone, needed by planning/placement\.py"
    ):
        require("torch._C._gone", ["planning/placement.py"])
    with pytest.raises(pytest.fail.Exception, match=r"has no torch\._gone\._either, needed by strategies/fsdp\.py"):
        require("torch._gone._either", ["strategies/fsdp.py"])


def test_the_names_are_all_found() -> None:
    found = {name.ours: users(name) for name in NAMES}
    assert found["swap_tensor_impl"] == [
        "filling/packed/plan.py",
        "recording/tensor/recorded_tensor.py",
        "sharding/dtensor.py",
    ]
    assert found["StridedShard"] == ["sharding/dtensor.py"]  # an import over several lines


# -- private attributes, used where the objects are --------------------------------------------------------------------


ATTRIBUTES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "tensor": (
        lambda: torch.zeros(1),
        ("_version", "_backward_hooks", "_post_accumulate_grad_hooks", "_neg_view", "_typed_storage"),
    ),
    "storage": (lambda: torch.zeros(1).untyped_storage(), ("_cdata",)),
    "typed storage": (
        lambda: torch.zeros(1)._typed_storage(),
        ("_untyped_storage", "_getitem", "_setitem", "_to", "_new_wrapped_storage", "_pickle_storage_type"),
    ),
    "generator": (torch.Generator, ("_cdata",)),
    "module": (
        lambda: nn.Linear(1, 1),
        (
            *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_apply"),
            *("_forward_pre_hooks", "_state_dict_pre_hooks"),
            *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        ),
    ),
    "operator": (lambda: torch.ops.aten.add.Tensor, ("_schema",)),
    "DTensor": (lambda: DTensor, ("_local_tensor", "_spec")),
    "FSDP policy": (lambda: ModuleWrapPolicy([nn.Linear]), ("_run_policy",)),
    "Fabric": (lambda: lightning.Fabric(accelerator="cpu"), ("_strategy", "_validate_setup", "_validate_launched")),
    "DDPStrategy": (DDPStrategy, ("_ddp_kwargs",)),
    "FSDPStrategy": (FSDPStrategy, ("_fsdp_kwargs",)),
    "ModelParallelStrategy": (lambda: ModelParallelStrategy(lambda model, _: model), ("_parallelize_fn",)),
    "DeepSpeedStrategy": (
        lambda: DeepSpeedStrategy,  # to make one, DeepSpeed would have to be installed
        (
            "_setup_distributed",
            "_set_world_ranks",
            "_init_deepspeed_distributed",
            "_format_config",
            "_initialize_engine",
        ),
    ),
    "DeepSpeedStrategy of the Trainer": (
        lambda: lightning.pytorch.strategies.DeepSpeedStrategy,
        ("_init_config_if_needed",),
    ),
    "LightningModule": (lightning.pytorch.LightningModule, ("_trainer", "_fabric")),
}


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [(kind, attribute) for kind, (_, attributes) in ATTRIBUTES.items() for attribute in attributes],
)
def test_private_attribute_exists(kind: str, attribute: str) -> None:
    holder = ATTRIBUTES[kind][0]()
    annotated = isinstance(holder, type) and attribute in getattr(holder, "__annotations__", {})
    if not annotated and not hasattr(holder, attribute):
        files = [
            path.relative_to(PACKAGE).as_posix()
            for path in sorted(PACKAGE.rglob("*.py"))
            if path.stem not in INTERNALS and re.search(rf"\b{attribute}\b", path.read_text(encoding="utf-8"))
        ]
        owner = holder if isinstance(holder, type) else type(holder)
        library = "lightning" if owner.__module__.startswith("lightning") else "torch"
        pytest.fail(f"{kind} of {installed(library)} has no {attribute}, needed by {', '.join(files)}", pytrace=False)


def test_private_attributes_are_those_that_the_files_list() -> None:
    listed = set[str]()
    for module in INTERNALS:
        text = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))) or ""
        listed.update(set(re.findall(r"``(_[a-z]\w*)``", text)) - set(INTERNALS))
    tested = {attribute for _, attributes in ATTRIBUTES.values() for attribute in attributes}
    assert tested <= listed
    assert listed - tested == {  # tests of the strategies need these, on objects that take long to make
        "_checkpoint_wrapped_module",
        "_config_initialized",
        "_fsdp_wrapped_module",
        "_orig_mod",
    }
