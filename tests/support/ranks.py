"""Run a function in several real processes that form one process group, as ``torchrun`` would start them.

    def my_ranks(fabric_kwarg: str) -> int:          # top level of the test file, or of a helper
        fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=fabric_kwarg)
        fabric.launch()
        return fabric.global_rank

    assert run_ranks(2, my_ranks, fabric_kwarg="ddp") == [0, 1]

Processes are forked from a server that has torch, Lightning and more imported (``preloaded.py``): they start in
milliseconds, and each is new.
A rank that fails or hangs takes the others with it, and what it printed is in the error.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

Result = TypeVar("Result")

SECONDS = 60.0
"""How long a group of ranks may take before it is killed."""
GRACE_SECONDS = 10.0
"""How long the others may go on after one rank has failed: they should notice by themselves."""

_ROOT = Path(__file__).parents[2]
_SHOWN_CHARACTERS = 6000
_start = multiprocessing.get_context("forkserver")
_start.set_forkserver_preload(["tests.support.preloaded"])


@dataclass
class Outcome:
    """What became of one rank. ``error`` is the traceback, or how the process died; empty if all went well."""

    rank: int
    value: Any = None
    error: str = ""
    output: str = ""
    seconds: float = 0.0


class RanksFailedError(AssertionError):
    """At least one rank raised, died or hung."""


def run_ranks(
    world_size: int, function: Callable[..., Result], *, seconds: float = SECONDS, **kwargs: Any
) -> list[Result]:
    """What ``function(**kwargs)`` returns on each of ``world_size`` ranks.

    Args:
        world_size: how many processes; each has ``RANK``, ``WORLD_SIZE`` and the like in its environment.
        function: defined at the top level of a file. What it takes and returns is pickled.
        seconds: after that, whatever still runs is killed.

    Raises:
        RanksFailedError: with traceback and output of every rank that did not return.
    """
    __tracebackhide__ = True  # what matters is in the message
    outcomes = try_ranks(world_size, function, seconds=seconds, **kwargs)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        parts = [f"{len(failed)} of {world_size} ranks failed"]
        for outcome in failed:
            parts.append(f"--- rank {outcome.rank}, after {outcome.seconds:.1f} s ---\n{outcome.error.strip()}")
            if outcome.output:
                parts.append(f"--- rank {outcome.rank} printed ---\n{outcome.output[-_SHOWN_CHARACTERS:].strip()}")
        raise RanksFailedError("\n".join(parts))
    return [outcome.value for outcome in outcomes]


def run_ranks_each(
    world_size: int,
    function: Callable[..., Result],
    cases: Mapping[Any, Mapping[str, Any]],
    *,
    seconds: float = SECONDS,
    **kwargs: Any,
) -> dict[Any, list[Result]]:
    """:func:`run_ranks` for each of ``cases``, one after the other in one group: to start one takes longer.

    Args:
        world_size: how many processes.
        function: called with the keyword arguments of a case, and with ``kwargs``.
        cases: what they are called, and their arguments.
        seconds: how long the group may take, beside a few for each case.

    Returns:
        For each case, what each rank returned.
    """
    __tracebackhide__ = True
    file, name = function.__code__.co_filename, function.__qualname__
    calls = {case: {**kwargs, **arguments} for case, arguments in cases.items()}
    ranks = run_ranks(world_size, _call_each, seconds=seconds + 5 * len(calls), file=file, name=name, calls=calls)
    return {case: [rank[case] for rank in ranks] for case in calls}


def _call_each(file: str, name: str, calls: dict[Any, dict[str, Any]]) -> dict[Any, Any]:
    function = getattr(_module_of(file), name)
    results = {}
    for case, arguments in calls.items():
        try:
            results[case] = function(**arguments)
        except Exception as error:
            error.add_note(f"in the case {case!r}")
            raise
    return results


def try_ranks(
    world_size: int, function: Callable[..., Any], *, seconds: float = SECONDS, **kwargs: Any
) -> list[Outcome]:
    """As :func:`run_ranks`, but failures are for the caller to look at."""
    _ensure_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        # As under torchrun, the store lives outside the ranks. It picks a port itself, so none can be taken meanwhile.
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        file, name = function.__code__.co_filename, function.__qualname__
        assert "<" not in name, f"{name} is not at the top level of its file"
        processes = []
        for rank in range(world_size):
            arguments = (Path(folder), rank, world_size, store.port, file, name, kwargs)
            process = _start.Process(target=_rank_main, args=arguments, daemon=False)
            process.start()
            processes.append(process)
        took = _wait(processes, seconds)
        return [_outcome(Path(folder), rank, process, took[rank]) for rank, process in enumerate(processes)]


def _ensure_server() -> None:
    """DeepSpeed decides on import what it runs on, and would take a GPU where there is one."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("PYTHONPATH", path)  # for what is preloaded
        multiprocessing.forkserver.ensure_running()


def _wait(processes: list[BaseProcess], seconds: float) -> list[float]:
    """Until all have ended, one way or another; gives how long each took."""
    start = time.monotonic()
    end = start + seconds
    took = [0.0] * len(processes)
    running = dict(enumerate(processes))
    try:
        while running and time.monotonic() < end:
            for rank, process in list(running.items()):
                process.join(0.01)
                if process.exitcode is not None:
                    took[rank] = time.monotonic() - start
                    del running[rank]
                    if process.exitcode != 0:
                        end = min(end, time.monotonic() + GRACE_SECONDS)
    finally:
        for rank, process in running.items():
            took[rank] = time.monotonic() - start
            _signal(process, signal.SIGUSR1)  # print where it hangs
        if running:
            time.sleep(0.5)
        for process in processes:
            _signal(process, signal.SIGKILL)  # with all that it started
            process.join()
    return took


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    try:
        if number is signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
    except ProcessLookupError:
        if number is signal.SIGKILL and process.is_alive():
            process.kill()  # it has not yet come to lead a group of its own


def _outcome(folder: Path, rank: int, process: BaseProcess, seconds: float) -> Outcome:
    log, result = folder / f"{rank}.log", folder / f"{rank}.pickle"
    output = log.read_text(errors="replace") if log.exists() else ""
    if result.exists():
        value, error = pickle.loads(result.read_bytes())
        return Outcome(rank, value, error, output, seconds)
    code = process.exitcode
    assert code is not None
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return Outcome(rank, None, f"no result: {how}", output, seconds)


# -- in the rank -------------------------------------------------------------------------------------------------------


def _rank_main(
    folder: Path, rank: int, world_size: int, port: int, file: str, name: str, kwargs: dict[str, Any]
) -> None:
    os.setpgid(0, 0)
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(environment_of_a_rank(rank, world_size, port))
    torch.set_num_threads(1)
    value, error = None, ""
    try:
        value = getattr(_module_of(file), name)(**kwargs)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps((value, error)))
    partial.rename(folder / f"{rank}.pickle")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if error else 0)  # a process group that others have left can hang an orderly exit


def environment_of_a_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets, and what keeps ranks on this machine."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _module_of(file: str) -> ModuleType:
    """Test files are no modules that can be imported by name."""
    name = f"_in_rank_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
