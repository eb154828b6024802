"""The fixture in conftest.py can fail: each kind of leak is tried, in a pytest of its own."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks

LEAKS = {
    "function_mode": ("torch function modes", "BaseTorchFunctionMode().__enter__()"),
    "dispatch_mode": ("torch dispatch modes", "TorchDispatchMode().__enter__()"),
    "environment": ("environment variables", "os.environ['LEAKED'] = 'yes'"),
    "process_group": ("process group", "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)"),
    "dtype": ("default dtype", "torch.set_default_dtype(torch.float64)"),
    "device": ("default device", "torch.set_default_device('meta')"),
    "grad_mode": ("grad mode", "torch.set_grad_enabled(False)"),
    "init_function": ("torch.nn.init functions", "torch.nn.init.normal_ = torch.nn.init.uniform_"),
    "module_hook": (
        "global module hooks",
        "torch.nn.modules.module.register_module_parameter_registration_hook(lambda *_: None)",
    ),
    "deterministic": ("deterministic algorithms", "torch.use_deterministic_algorithms(True)"),
    "fill_memory": ("fill_uninitialized_memory", "torch.utils.deterministic.fill_uninitialized_memory = False"),
}


@pytest.fixture(scope="module")
def leak_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says about a file in which every test but one leaks. One process for all."""
    folder = tmp_path_factory.mktemp("leaks")
    source = "import os\nimport torch\nimport torch.distributed as dist\n"
    source += "from torch.overrides import BaseTorchFunctionMode\n"
    source += "from torch.utils._python_dispatch import TorchDispatchMode\n\n"
    source += "def test_clean(): torch.manual_seed(5)\n"
    source += "".join(f"def test_{name}(): {statement}\n" for name, (_, statement) in LEAKS.items())
    (folder / "test_leaking.py").write_text(source)
    (folder / "conftest.py").write_text(Path(__file__).parents[1].joinpath("conftest.py").read_text())
    (report,) = run_ranks(1, what_pytest_says, folder=folder)
    return report


def what_pytest_says(folder: Path) -> str:
    os.chdir(folder)
    options = ["-rA", "-p", "no:cacheprovider", "-p", "no:warnings", "-o", "markers=quick", "--rootdir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pytest.main([*options, str(folder)])
    return output.getvalue()


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_fails_the_test_that_made_it_and_is_named(leak_report: str, name: str) -> None:
    kind, _ = LEAKS[name]
    section = leak_report.partition(f"ERROR at teardown of test_{name} ")[2].partition("ERROR at teardown")[0]
    assert "this test changed global state" in section
    assert f"{kind}: " in section


def test_a_test_that_leaks_nothing_passes(leak_report: str) -> None:
    assert "ERROR at teardown of test_clean" not in leak_report
    assert f"{len(LEAKS) + 1} passed, {len(LEAKS)} errors" in leak_report
