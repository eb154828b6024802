"""Fails a test that leaves global state behind: the next test would meet it, and so would a user of the library.

It also gives every test the marker ``quick`` that is not in one of the slow groups: ``python -m pytest -m quick -n 2``,
and leaves out of sweeps what is not in their samples.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import lightning  # noqa: F401  (sets environment variables when it is first imported: not while a test runs)
import pytest
import torch
from hypothesis import settings
from torch.nn.modules import module as torch_module
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tests.support.sweeps import leave_out_of_sample

# Two processes run tests, on as many cores; and with more threads, sums come in another order than in the ranks.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Set by others while a test runs, and none of our business.
FOREIGN_VARIABLES = (
    "PYTEST_CURRENT_TEST",  # pytest
    "TORCHINDUCTOR_CACHE_DIR",  # torch, when its compiler is first imported
    "TRITON_CACHE_DIR",  # likewise
    "KMP_DUPLICATE_LIB_OK",  # scikit-learn, when first imported
    "KMP_INIT_AT_FORK",  # likewise
    "CC",  # peft, where BOFT cannot build its CUDA extension
    "CXX",  # likewise
)
# Listed once: the module also gains names by itself, `__warningregistry__` for one.
INIT_FUNCTIONS = tuple(name for name, value in vars(torch.nn.init).items() if callable(value))
HOOK_TABLES = tuple(
    name for name, value in vars(torch_module).items() if name.startswith("_global_") and isinstance(value, dict)
)

# The groups that `-m quick` leaves out, as paths from here, and what they take their time for. `--durations=25` tells.
SLOW = {
    "call_orders/*": "hundreds of orders of calls, some on two ranks",
    "checkpoints/formats/test_hostile_dcp.py": "thousands of damaged files",
    "checkpoints/formats/test_dcp.py": "saves with ranks",
    "checkpoints/formats/test_deepspeed.py": "saves with DeepSpeed",
    "checkpoints/test_hub.py": "forks a process without a network for each test",
    "checkpoints/test_every_format.py": "writes a checkpoint in every format",
    "checkpoints_hf/*": "builds and saves models of transformers, and starts ranks",
    "cli/test_audit.py": "starts the command line anew for each test",
    "cli/test_demo.py": "builds the demo's encoder several times",
    "cli/test_inspect.py": "starts the command line anew for each test",
    "distributed/*": "starts ranks",
    "faults/*": "starts ranks",
    "fidelity/*": "builds every architecture twice",
    "filling/test_interrupted.py": "stops processes at many places",
    "fuzz/*": "thousands of damaged files",
    "gpu/*": "needs a GPU",
    "idioms/test_peft_tuners.py": "builds a model with each tuner of peft, and starts ranks",
    "load_code/test_on_ranks.py": "starts ranks",
    "load_code/test_random_trees.py": "hundreds of models",
    "mangled/test_mangled.py": "dozens of models, each loaded several times",
    "meta/test_docs.py": "runs the documentation and the examples",
    "meta/test_leaks.py": "a pytest of its own",
    "meta/test_lint.py": "mypy",
    "meta/test_site.py": "builds the documentation",
    "planning/test_extra_state.py": "starts ranks",
    "recording/test_every_function.py": "calls thousands of functions, in a process of its own",
    "reports/html/test_in_a_browser.py": "starts a browser",
    "sharding/test_every_way.py": "starts ranks",
    "sharding/test_plain_pytorch.py": "starts ranks",
    "stacks/*": "imports large libraries in ranks, and trains",
    "test_never_empty.py": "every way to leave a tensor without values",
    "tools/audit/measure/test_probe.py": "audits real architectures",
    "tools/audit/test_transformers.py": "audits real architectures",
    "tools/inspect/test_formats.py": "writes a checkpoint in every format",
    "trainer/test_on_ranks.py": "starts ranks",
}
QUICK = {
    "checkpoints_hf/test_the_comparison.py",
    "distributed/test_broadcast_buffers.py",
    "distributed/test_broadcast_reader.py",
}
"""Files that are quick although their folder is not."""


def is_quick(file: str) -> bool:
    """Return whether the tests of ``file``, a path from this folder, belong to the quick ones."""
    return file in QUICK or not any(fnmatch(file, pattern) for pattern in SLOW)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out_of_sample(config, items)
    part, parts = config.getoption("--part")
    left_out = [item for number, item in enumerate(items) if number % parts != part - 1]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[part - 1 :: parts]
    for item in items:
        if is_quick(item.path.relative_to(Path(__file__).parent).as_posix()):
            item.add_marker("quick")
    items.sort(key=lambda item: item.get_closest_marker("quick") is not None)  # the slow first, so that no worker waits


def environment() -> dict[str, str]:
    variables = os.environ.copy()
    for name in FOREIGN_VARIABLES:
        variables.pop(name, None)
    return variables


def global_state() -> dict[str, object]:
    """Everything a test could leave behind, in plain data that `==` can compare."""
    return {
        "torch function modes": _len_torch_function_stack(),
        "torch dispatch modes": tuple(_get_current_dispatch_mode_stack()),
        "environment variables": environment(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "torch.nn.init functions": tuple(map(vars(torch.nn.init).get, INIT_FUNCTIONS)),
        "global module hooks": {name: tuple(getattr(torch_module, name)) for name in HOOK_TABLES},
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,
    }


def differing(before: object, after: object) -> str:
    """The part that changed: a whole environment in an error message helps nobody."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return ", ".join(f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in names)
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return ", ".join(f"{one!r} -> {other!r}" for one, other in zip(before, after, strict=True) if one != other)
    return f"{before!r} -> {after!r}"


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    if before != after:
        leaks = [f"{name}: {differing(before[name], after[name])}" for name in before if before[name] != after[name]]
        pytest.fail("this test changed global state:\n  " + "\n  ".join(leaks), pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    # Random models are the same in every run, until somebody asks for others with `--hypothesis-seed`, which hypothesis
    # itself does not heed where `derandomize` is set. How long an example takes says more of the machine than of code.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
    settings.register_profile("random models", derandomize=config.getoption("--hypothesis-seed") is None)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Let gc.collect(), which blocks call that build several models, look at what a test has made alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether a sweep runs all it has, and not a sample."""
    return bool(request.config.getoption("--whole"))


def part_of(text: str) -> tuple[int, int]:
    """Read ``2/8``: the second of eight parts."""
    part, _, parts = text.partition("/")
    if not 1 <= int(part) <= int(parts):
        raise ValueError(text)
    return int(part), int(parts)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="all of a sweep, not only the sample")
    parser.addoption(
        "--part", type=part_of, default=(1, 1), help="one part of all tests: 2/8 is each eighth, from the second"
    )
    parser.addoption("--first", type=int, default=0, help="mangled and fuzz tests: the number of the first example")
    parser.addoption("--examples", type=int, default=100, help="fuzz tests: damaged checkpoints of each format")
    parser.addoption("--example", type=int, help="fuzz tests: the number of the only one to run")
