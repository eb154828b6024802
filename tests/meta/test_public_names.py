"""`__all__` tells the truth: every name in it exists, and every public name is in it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fabric_init

MODULES = ["fabric_init"] + [
    name for _, name, _ in pkgutil.walk_packages(fabric_init.__path__, "fabric_init.") if not name.endswith("__main__")
]


def wrong_names(module: ModuleType) -> list[str]:
    names: list[str] = list(module.__all__)
    problems = [f"{name} is in __all__, but does not exist" for name in names if not hasattr(module, name)]
    problems += [f"{name} is in __all__ twice" for name in sorted(set(names)) if names.count(name) > 1]
    return problems


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists(name: str) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        assert wrong_names(module) == []


def test_every_public_name_of_the_package_is_in_all() -> None:
    for name in fabric_init.__all__:
        getattr(fabric_init, name)  # which imports it
    # `annotations` and the like come from __future__.
    public = {
        name
        for name, value in vars(fabric_init).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and type(value).__module__ != "__future__"
    }
    assert public == {name for name in fabric_init.__all__ if not isinstance(getattr(fabric_init, name), ModuleType)}


def test_the_check_sees_names_that_are_missing_or_listed_twice() -> None:
    module = ModuleType("example")
    module.here = 1
    module.__all__ = ["gone", "here", "here"]
    assert wrong_names(module) == ["gone is in __all__, but does not exist", "here is in __all__ twice"]


def test_names_come_from_where_type_checkers_are_told() -> None:
    assert fabric_init.__file__ is not None
    tree = ast.parse(Path(fabric_init.__file__).read_text())
    told = {
        alias.name: f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name: f"fabric_init.{home}" for name, home in fabric_init._HOMES.items()} == told
    assert told.keys() == set(fabric_init.__all__)


def test_packages_that_users_look_into_need_no_import_of_their_own() -> None:
    code = "import fabric_init; fabric_init.strategies.FSDP2Strategy, fabric_init.checkpoints.Fuse"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Febric'"):
        _ = fabric_init.Febric
    assert set(fabric_init.__all__) <= set(dir(fabric_init))


IN_THREADS = """
import sys, fabric_init
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(len(fabric_init.__all__)) as pool:
    list(pool.map(lambda name: getattr(fabric_init, name), fabric_init.__all__))
"""


def test_threads_may_ask_for_their_first_names_at_once() -> None:
    subprocess.run([sys.executable, "-c", IN_THREADS], check=True)
