"""A pytest plugin for Lightning's own tests: puts our classes in the places of Lightning's, and writes what came out.

It is loaded by `run.py`, in a process that has nothing of this project's own tests.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.fabric.connector
import lightning.fabric.fabric
import lightning.fabric.strategies
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightning_suite")
    group.addoption("--classes", choices=("theirs", "ours"), default="theirs", help="which classes the tests get")
    group.addoption("--package", default="lightning.pytorch", help="the package that the tests import the Trainer from")
    group.addoption("--outcomes", help="the file that gets a line for each test: name, outcome, reason")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of pytest-rerunfailures, which is not needed here")
    if config.getoption("classes") == "ours":
        use_fabric()
        use_trainer(config.getoption("package"))
    if (path := config.getoption("outcomes")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path))


class Outcomes:
    """Writes a line for each test that has passed, failed or been skipped, and for files that cannot be collected."""

    def __init__(self, path: str) -> None:
        self._file = Path(path)
        self._file.touch()
        self._written: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports, of which the worst counts; the last line of a test is read.
        if report.passed and report.when != "teardown":
            return
        worse = ("passed", "skipped", "failed").index
        before = self._written.get(report.nodeid)
        if before is None or worse(report.outcome) > worse(before):
            self._written[report.nodeid] = report.outcome
            self._write(report.outcome, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("failed", report)

    def _write(self, outcome: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash is not None else str(report.longrepr or "")
        reason = " ".join(reason.split())[-300:] if outcome == "failed" else ""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\t{outcome}\t{reason}\n")


# -- our classes -------------------------------------------------------------------------------------------------------


def use_fabric() -> None:
    """Put ``fabric_init.Fabric`` and the strategies where users, and Lightning's tests, import theirs from."""
    import fabric_init.strategies

    instead(lightning.fabric.Fabric, fabric_init.Fabric)
    for name in fabric_init.strategies.__all__:
        ours, theirs = getattr(fabric_init.strategies, name), getattr(lightning.fabric.strategies, name, None)
        if theirs is not None:
            instead(theirs, ours)
    from fabric_init.strategies.registry import with_deferred_init

    class Connector(lightning.fabric.connector._Connector):
        """Lightning's, which gives strategies our classes as ``fabric_init.Fabric`` does."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            with_deferred_init(self.strategy)

    stand_in(Connector, lightning.fabric.connector._Connector)
    lightning.fabric.fabric._Connector = Connector  # type: ignore[misc]  # ranks are sent it, by its name


def use_trainer(package: str) -> None:
    """Let every ``Trainer`` have a callback ``FillModel``, and every strategy the mixin that it gives one."""
    from fabric_init.errors import FabricInitError
    from fabric_init.trainer import FillModel

    theirs: Any = importlib.import_module(package).Trainer

    class Trainer(theirs):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            with suppress(FabricInitError):  # refused by name: such a Trainer goes without
                FillModel().attach(self)

    stand_in(Trainer, theirs)


def stand_in(ours: Any, theirs: Any) -> None:
    """Put a class that is made here in the place of ``theirs``, which it looks like."""
    ours.__init__.__signature__ = inspect.signature(theirs.__init__)
    ours.__module__, ours.__name__, ours.__qualname__ = theirs.__module__, theirs.__name__, theirs.__qualname__
    instead(theirs, ours)


def instead(theirs: type, ours: type) -> None:
    """Put ``ours`` into the module that defines ``theirs``, and into the packages above that have it as a public name.

    The other modules of Lightning have imported theirs by now, and keep it: so it is for users.
    """
    for module in {*packages_of(theirs), sys.modules["lightning"]}:
        if vars(module).get(theirs.__name__) is theirs:
            setattr(module, theirs.__name__, ours)


def packages_of(cls: type) -> list[ModuleType]:
    names = cls.__module__.split(".")
    return [sys.modules[".".join(names[:end])] for end in range(1, len(names) + 1)]
