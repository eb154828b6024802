"""Run Lightning's own tests with its classes, then with ours in their places, and print which fail only with ours::

    python -m tests.lightning_suite.run CHECKOUT [tests_fabric] [tests_pytorch/strategies] [-n 2]

CHECKOUT is a clone of Lightning at the tag of the installed release. Its tests are copied, so that they leave nothing
behind there, and import the installed Lightning. The exit status is 1 if a test fails only with ours that
`expected.txt` does not list with its reason, or passes that it lists.
"""

from __future__ import annotations

import argparse
import os
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
    "tests_fabric": ("",),
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


def run(
    paths: list[str],
    classes: str,
    checkout: Path,
    processes: int = 2,
    only: str | None = None,
    package: str = "lightning.pytorch",
) -> dict[str, Outcome]:
    """Return what each test of the ``paths`` in one suite came to, by its name."""
    suite = suite_of(paths[0])
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "tests"
        copied.mkdir()
        shutil.copytree(checkout / "tests" / suite, copied / suite)
        shutil.copy(checkout / "pyproject.toml", folder)
        if package == "pytorch_lightning":
            use_pytorch_lightning(copied)
        outcomes = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-p", "tests.lightning_suite.plugin", "-p", "no:cacheprovider"]
        command += ["-c", str(Path(folder) / "pyproject.toml"), "--rootdir", str(copied), "-o", "addopts=", "-q"]
        command += ["-o", f"faulthandler_timeout={LIMIT}", "-o", "faulthandler_exit_on_timeout=true", "--tb=short"]
        command += ["-n", str(processes), "--dist", "loadfile", "--basetemp", str(Path(folder) / "temporary")]
        command += ["--classes", classes, "--package", package, "--outcomes", str(outcomes)]
        command += ["--disable-warnings", "--durations=15"]
        command += [str(copied / path) for path in paths] + (["-k", only] if only else [])
        found = [str(copied), str(PROJECT), str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found)), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # has `fabric`
        print(f"# {suite} with {classes}", flush=True)
        subprocess.run(command, cwd=copied, env=environment, check=False)
        if not outcomes.exists():
            raise SystemExit(f"{suite} could not be started with {classes}")
        lines = [line.split("\t") for line in outcomes.read_text(encoding="utf-8").splitlines()]
        return {name: Outcome(outcome, reason) for outcome, name, reason in lines}


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
    options = parser.parse_args()
    wrong = False
    for suite in SUITES:
        asked = [path for path in options.paths if suite_of(path) == suite]
        paths = asked or [f"{suite}/{part}" for part in SUITES[suite] if not options.paths]
        if not paths or (suite == "tests_fabric" and options.package == "pytorch_lightning"):
            continue  # our Fabric is of `lightning` alone
        theirs, ours = (
            run(paths, classes, options.checkout.resolve(), options.processes, options.only, options.package)
            for classes in ("theirs", "ours")
        )
        wrong |= compare(suite, theirs, ours)
    sys.exit(wrong)


def suite_of(path: str) -> str:
    """Return the suite of a path in it, or of the name of a test."""
    return path.partition("/")[0]


def compare(suite: str, theirs: dict[str, Outcome], ours: dict[str, Outcome]) -> bool:
    """Print how outcomes differ, and return whether a difference is not an expected one."""
    reasons = {name: reason for name, reason in expected().items() if name in theirs}
    passed = [name for name, outcome in theirs.items() if outcome.outcome == "passed"]
    failed = [name for name in passed if ours.get(name, Outcome("missing", "")).outcome != "passed"]
    failed += [name for name, outcome in ours.items() if outcome.outcome == "failed" and name not in theirs]
    print(f"\n# {suite}: {len(passed)} tests pass with Lightning's classes; {len(failed)} of them not with ours")
    new = [name for name in failed if name not in reasons]
    for name in failed:
        came = ours.get(name, Outcome("", "has not run"))
        print(f"{'' if name in reasons else 'NEW '}{name}\n    {reasons.get(name) or came.reason or came.outcome}")
    fixed = sorted(name for name in passed if name in reasons and name not in failed)
    for name in fixed:
        print(f"{name} passes: it need not be in expected.txt")
    return bool(new or fixed)


if __name__ == "__main__":
    main()
