"""Run Lightning's own tests with our classes in their places, and print which fail that pass with Lightning's::

    python -m tests.lightning_suite.run CHECKOUT [tests_fabric] [tests_pytorch/strategies] [-n 2] [--keep FOLDER]

CHECKOUT is a clone of Lightning at the tag of the installed release. Its tests are copied, so that they leave nothing
behind there, and import the installed Lightning. What does not pass with our classes is run again with Lightning's.
With `--keep`, what a path came to is kept in FOLDER and not run again: so all of it can be run bit by bit. The exit
status is 1 if a test fails only with ours that `expected.txt` does not list with its reason, or passes that it lists.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
# What is run: all of Fabric's tests, and of the Trainer's those about building, setting up and loading models.
SUITES = {
    "tests_fabric": (
        *("accelerators", "loggers", "plugins", "strategies", "utilities"),
        *("test_cli.py", "test_connector.py", "test_fabric.py", "test_wrappers.py"),
    ),
    "tests_pytorch": (
        *("strategies", "checkpointing", "trainer/connectors", "trainer/properties", "trainer/test_trainer.py"),
        *("core/test_lightning_module.py", "core/test_saving.py", "overrides", "models/test_hooks.py"),
        *("models/test_restore.py", "models/test_fabric_integration.py", "callbacks/test_callbacks.py"),
        *("callbacks/test_model_summary.py", "utilities/test_model_summary.py", "utilities/test_compile.py"),
    ),
}
# A test that takes longer has hung: it fails, and its process is replaced.
LIMIT = 240


class Outcome(NamedTuple):
    """What a test came to."""

    outcome: str
    reason: str


class Session(NamedTuple):
    """How all pieces are run."""

    checkout: Path
    processes: int = 2
    only: str | None = None
    package: str = "lightning.pytorch"
    keep: Path | None = None

    def outcomes(self, paths: list[str]) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
        """Return what each test under ``paths``, in one suite, came to with our classes, and of those that did not
        pass what they came to with Lightning's, by their names.
        """
        found: tuple[dict[str, Outcome], dict[str, Outcome]] = {}, {}
        for path in paths:
            files = [self._file(path, classes) for classes in ("ours", "theirs")]
            if all(file is not None and file.exists() for file in files):
                both = [read_outcomes(file.read_text(encoding="utf-8")) for file in files if file is not None]
            else:
                ours = self._run([path], "ours")
                left = [name for name, outcome in ours.items() if outcome.outcome != "passed"]
                both = [ours, self._run(left, "theirs") if left else {}]
                for file, outcomes in zip(files, both, strict=True):  # only now: what was interrupted is run again
                    if file is not None:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_text(as_text(outcomes), encoding="utf-8")
            for all_outcomes, outcomes in zip(found, both, strict=True):
                all_outcomes.update(outcomes)
        return found

    def _file(self, path: str, classes: str) -> Path | None:
        name = "-".join(filter(None, (self.package, path, self.only, classes)))
        return None if self.keep is None else self.keep / re.sub(r"[^\w.]+", "-", name)

    def _run(self, paths: list[str], classes: str) -> dict[str, Outcome]:
        with tempfile.TemporaryDirectory() as name:
            folder, suite = Path(name), suite_of(paths[0])
            copied, outcomes = folder / "tests", folder / "outcomes"
            shutil.copytree(self.checkout / "tests" / suite, copied / suite)
            shutil.copy(self.checkout / "pyproject.toml", folder)
            if self.package == "pytorch_lightning":
                use_pytorch_lightning(copied)
            command = [sys.executable, "-m", "pytest", "-p", "tests.lightning_suite.plugin", "-p", "no:cacheprovider"]
            command += ["-c", str(folder / "pyproject.toml"), "--rootdir", str(copied), "-o", "addopts=", "-q"]
            command += ["-o", f"faulthandler_timeout={LIMIT}", "-o", "faulthandler_exit_on_timeout=true", "--tb=short"]
            command += ["-n", str(self.processes), "--dist", "loadfile", "--basetemp", str(folder / "temporary")]
            command += ["--classes", classes, "--package", self.package, "--outcomes", str(outcomes)]
            command += ["--disable-warnings", "--durations=15", *(str(copied / path) for path in paths)]
            command += ["-k", self.only] if self.only else []
            print(f"# {' '.join(paths[:5])} with {classes}", flush=True)
            ended = subprocess.run(command, cwd=copied, env=environment(copied), check=False).returncode
            if not outcomes.exists() or ended not in (0, 1, 5):  # passed, failed, or nothing of that name
                raise SystemExit(f"{' '.join(paths[:5])} could not be run with {classes}")
            return read_outcomes(outcomes.read_text(encoding="utf-8"))


def environment(tests: Path) -> dict[str, str]:
    """Return the environment in which the copied ``tests`` find what they import."""
    found = [str(tests), str(PROJECT), str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # has `fabric`
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found)), "OMP_NUM_THREADS": "1", "PATH": path}


def as_text(outcomes: dict[str, Outcome]) -> str:
    """Return what the plugin would write of ``outcomes``."""
    return "".join(f"{name}\t{outcome}\t{reason}\n" for name, (outcome, reason) in outcomes.items())


def read_outcomes(text: str) -> dict[str, Outcome]:
    """Return the outcomes of tests in what the plugin has written, by name."""
    lines = [line.split("\t") for line in text.splitlines()]
    return {name: Outcome(outcome, reason) for name, outcome, reason in lines}


def use_pytorch_lightning(folder: Path) -> None:
    """Let all files in ``folder`` import the package of that name, as Lightning does for its release."""
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for ours, theirs in (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")):
            text = text.replace(ours, theirs)
        file.write_text(text, encoding="utf-8")


def expected() -> dict[str, str]:
    """Return why a test fails with our classes although nothing is wrong, by its name."""
    reasons, reason = {}, ""
    for line in (HERE / "expected.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of Lightning, at the tag of the installed release")
    parser.add_argument("paths", nargs="*", help=f"what to run of {' and '.join(SUITES)}; all that matters by default")
    parser.add_argument("-n", type=int, default=2, dest="processes", help="how many processes run tests")
    parser.add_argument("-k", dest="only", help="pytest's -k: tests with these names alone")
    parser.add_argument("--package", choices=("lightning.pytorch", "pytorch_lightning"), default="lightning.pytorch")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep outcomes there, and use what it has")
    options = parser.parse_intermixed_args()
    keep = options.keep and options.keep.resolve()
    session = Session(options.checkout.resolve(), options.processes, options.only, options.package, keep)
    wrong = False
    for suite in SUITES:
        asked = [path for path in options.paths if path != suite and suite_of(path) == suite]
        whole = suite in options.paths or not options.paths
        paths = [f"{suite}/{part}" for part in SUITES[suite]] if whole else asked
        if not paths or (suite == "tests_fabric" and options.package == "pytorch_lightning"):
            continue  # our Fabric is of `lightning` alone
        wrong |= compare(suite, *session.outcomes(paths))
    sys.exit(wrong)


def suite_of(path: str) -> str:
    """Return the suite of a path in it, or of the name of a test."""
    return path.partition("/")[0]


def compare(suite: str, ours: dict[str, Outcome], theirs: dict[str, Outcome]) -> bool:
    """Print how outcomes differ, and return whether a difference is not an expected one.

    Args:
        suite: Where the tests are.
        ours: What each test came to with our classes.
        theirs: What those that did not pass came to with Lightning's.
    """
    reasons = {name: reason for name, reason in expected().items() if name in ours}
    passed = [name for name, outcome in ours.items() if outcome.outcome == "passed"]
    failed = [name for name, outcome in theirs.items() if outcome.outcome == "passed"]
    failed += [name for name, outcome in ours.items() if outcome.outcome == "failed" and name not in theirs]
    print(f"\n# {suite}: {len(passed)} tests pass with our classes; {len(failed)} that pass with Lightning's do not")
    new = [name for name in failed if name not in reasons]
    for name in failed:
        came = ours.get(name, Outcome("", "has not run"))
        print(f"{'' if name in reasons else 'NEW '}{name}\n    {reasons.get(name) or came.reason or came.outcome}")
    fixed = sorted(name for name in passed if name in reasons)
    for name in fixed:
        print(f"{name} passes: it need not be in expected.txt")
    return bool(new or fixed)


if __name__ == "__main__":
    main()
