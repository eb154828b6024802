"""One script under every launcher: each gives the weights of one device, and leaves no process behind.

Real commands, which import everything anew: without ``--whole`` each launcher has its turn with one strategy.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.launched import train
from tests.support.processes import Done, run_to_the_end
from tests.support.zoo import assert_same, one_device, weights, write_checkpoint

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "support" / "launched.py"
BIN = Path(sys.executable).parent
_TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node=2"]
CLASSES = {"ddp": "DDPStrategy", "fsdp2": "FSDP2Strategy"}
in_every_strategy = pytest.mark.parametrize("strategy", list(CLASSES))


def _free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True)


@pytest.fixture
def expected(checkpoint: Path) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """One device's weights, its losses, and its weights after training."""
    model = one_device("transformerish", checkpoint=checkpoint, strict=False)
    before = weights(model)
    losses = train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    return before, losses, weights(model)


def _check(done: Done, folder: Path, strategy: str, expected: Any) -> list[dict[str, Any]]:
    assert done.code == 0, done.output
    assert not done.left, f"still running when the command had ended: {done.left}"
    before, losses, after = expected
    found = [torch.load(folder / f"rank {rank}.pt") for rank in range(2)]
    for each in found:
        assert (each["strategy"], each["world size"]) == (CLASSES[strategy], 2)
        assert_same(each["before"], before)
        assert each["losses"] == losses
        assert_same(each["after"], after)
    return found


@pytest.mark.sweep("fsdp2")
@in_every_strategy
def test_started_as_it_is(strategy: str, checkpoint: Path, tmp_path: Path, expected: Any) -> None:
    command = [sys.executable, SCRIPT, checkpoint, tmp_path, "--strategy", strategy]
    _check(run_to_the_end(command), tmp_path, strategy, expected)


@pytest.mark.sweep(every=0)  # `fabric run` starts torchrun
@in_every_strategy
def test_started_by_torchrun(strategy: str, checkpoint: Path, tmp_path: Path, expected: Any) -> None:
    command = [*_TORCHRUN, SCRIPT, checkpoint, tmp_path]
    _check(run_to_the_end([*command, "--strategy", strategy]), tmp_path, strategy, expected)


def _fabric_run(*options: str | Path) -> list[str | Path]:
    return [BIN / "fabric", "run", "--accelerator=cpu", "--devices=2", f"--main-port={_free_port()}", *options]


@pytest.mark.sweep(every=0)
def test_started_by_fabric_run(checkpoint: Path, tmp_path: Path, expected: Any) -> None:
    command = _fabric_run(SCRIPT, "--", checkpoint, tmp_path, "--strategy=fsdp2")
    _check(run_to_the_end(command), tmp_path, "fsdp2", expected)


@pytest.mark.sweep(every=0)
def test_fabric_run_names_a_strategy_of_lightning(checkpoint: Path, tmp_path: Path, expected: Any) -> None:
    command = _fabric_run("--strategy=ddp", SCRIPT, "--", checkpoint, tmp_path)
    _check(run_to_the_end(command), tmp_path, "ddp", expected)


def test_fabric_run_takes_fsdp2_from_the_environment(checkpoint: Path, tmp_path: Path, expected: Any) -> None:
    command = _fabric_run(SCRIPT, "--", checkpoint, tmp_path)
    _check(run_to_the_end(command, environment={"LT_STRATEGY": "fsdp2"}), tmp_path, "fsdp2", expected)


@pytest.mark.sweep("torchrun")
@pytest.mark.parametrize("launcher", ["the script itself", "torchrun"])
def test_a_rank_that_fails_ends_the_others(launcher: str, checkpoint: Path, tmp_path: Path) -> None:
    script: list[str | Path] = [SCRIPT, checkpoint, tmp_path, "--strategy=fsdp2", "--failing=1"]
    start = [sys.executable] if launcher == "the script itself" else _TORCHRUN
    done = run_to_the_end([*start, *script])
    assert done.code != 0
    assert not done.left
    assert "LookupError: the user's own mistake" in done.output
    # torchrun ends the other ranks as soon as one has failed, which a slow one may not hear of before
    is_ended = launcher == "torchrun" and "closing signal SIGTERM" in done.output
    assert is_ended or "building the model failed on rank 1, so all ranks stop" in done.output


# -- two machines ------------------------------------------------------------------------------------------------------


def _need_network_namespaces() -> None:
    probe = ["unshare", "--map-root-user", "--net", "ip", "link", "add", "here", "type", "veth", "peer", "there"]
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"the program {program} is not here")
    done = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces for this user: {done.stderr.strip()}")


@pytest.mark.sweep("fsdp2")
@in_every_strategy
def test_two_machines(strategy: str, checkpoint: Path, tmp_path: Path, expected: Any) -> None:
    _need_network_namespaces()
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29400"]
    script = [SCRIPT, checkpoint, tmp_path, "--strategy", strategy, "--devices=1", "--num-nodes=2"]
    machines = ["unshare", "--map-root-user", "--net", "sh", HERE / "two_machines.sh"]
    done = run_to_the_end([*machines, BIN / "torchrun", *rendezvous, *script])
    found = _check(done, tmp_path, strategy, expected)
    assert [each["node rank"] for each in found] == [0, 1]
    assert found[0]["network"] != found[1]["network"]
