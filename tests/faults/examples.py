"""One example: a strategy, a way to values, and a fault on one rank; and what came of it."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fabric_init import Fabric, FabricInitError, deferred_init, init_missing, materialize
from fabric_init.strategies import DDPStrategy, DeepSpeedStrategy, FSDP2Strategy, FSDPStrategy
from tests.faults.faults import ACTS, DEADLY, InjectedError, at_call
from tests.faults.models import OTHERWISE, Net, values
from tests.support.ranks import Outcome, try_ranks
from tests.support.zoo import prepare_deepspeed, weights

FILE = "model.safetensors"
TIMEOUT = timedelta(seconds=8)
"""Of the process group: so long the ranks wait for one that does not come."""
SECONDS = 30.0
"""What takes longer hangs."""

SURVIVED, CLEAR, UNCLEAR, HUNG, SILENT = OUTCOMES = ("survived", "clear", "unclear", "hung", "silent")

STRATEGIES = {"ddp": 6, "fsdp2": 8, "fsdp": 2, "deepspeed_stage_2": 1, "deepspeed_stage_3": 2, "plain fsdp2": 4, "plain ddp": 3}
WAYS = ("declared", "partial", "broadcast", "init_missing", "load_state_dict", "init in setup")
FILES = ("missing", "other", "truncated", "one element", "one key fewer", "other dtype", "copied")
OPTIONS = ("other strategy", "other io", "other way", "eager", "other rename", "not strict", "other seed", "other path")
ORDERS = ("skips the block", "leaves early", "builds twice", "two models in another order")


@dataclass
class Example:
    """The example number ``seed``."""

    seed: int
    strategy: str = ""
    way: str = ""
    ranks: int = 2
    odd: int = 0
    fault: tuple[str, str] = ("", "")
    call: int = 0
    order: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def of(cls, seed: int) -> Example:
        rng = Random(seed)
        strategy = rng.choices(list(STRATEGIES), list(STRATEGIES.values()))[0]
        ways = [way for way in WAYS if "plain" not in strategy or way not in ("broadcast", "init in setup")]
        ranks = rng.choice((2, 2, 3))
        kind = rng.choices(("act", "file", "model", "option", "order"), (10, 4, 3, 3, 2))[0]
        names = {"act": ACTS, "file": FILES, "model": OTHERWISE, "option": OPTIONS, "order": ORDERS}[kind]
        way = rng.choice(ways[:3] if kind == "file" else ways)
        call = int(math.exp(rng.uniform(0, math.log(3000))))
        return cls(seed, strategy, way, ranks, rng.randrange(ranks), (kind, rng.choice(list(names))), call)

    def __str__(self) -> str:
        kind, what = self.fault
        at = f" at call {self.call}" if kind == "act" else ""
        return f"seed {self.seed}: {self.strategy}, {self.way}, {kind} {what!r}{at} on rank {self.odd} of {self.ranks}"


@dataclass
class Answer:
    """What became of an example, and why that is said of it."""

    outcome: str
    why: str
    seconds: float


# -- in the ranks ------------------------------------------------------------------------------------------------------


def run_rank(seed: int, folder: Path) -> dict[str, Any]:
    """What this rank ends in; it lives until all others have ended, too, or have had the time to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    example, rank = Example.of(seed), int(os.environ["RANK"])
    start, models = time.monotonic(), []
    found: dict[str, Any] = {"error": "", "message": "", "digest": ""}
    try:
        found["digest"] = _program(example, rank, folder / f"node {rank}", models)
    except BaseException as error:
        found.update(error=type(error).__name__, message=" ".join(str(error).split())[:600])
        found["ours"] = isinstance(error, FabricInitError)
    sys.setprofile(None)
    found["seconds"] = time.monotonic() - start
    if found["error"]:
        found["usable"] = [wrong for model in models for wrong in _wrong_values(model, example, folder)]
    (folder / f"ended {rank}").touch()
    alive = example.ranks - (example.fault[1] in DEADLY)
    while time.monotonic() < start + SECONDS - 4 and len(list(folder.glob("ended *"))) < alive:
        time.sleep(0.05)
    return found


def _program(example: Example, rank: int, folder: Path, models: list[nn.Module]) -> str:
    os.chdir(folder)
    is_odd = rank == example.odd
    kind, what = example.fault if is_odd else ("", "")
    strategy, way = example.strategy, example.way
    if what == "other strategy":
        strategy = {"ddp": "fsdp2", "plain ddp": "plain fsdp2", "plain fsdp2": "plain ddp"}.get(strategy, "ddp")
    if what == "other way":
        way = "declared" if way in ("init_missing", "load_state_dict", "init in setup") else "init_missing"
    io = "broadcast" if (way == "broadcast") != (what == "other io") else "local"
    torch.manual_seed(7 if what == "other seed" else 5)
    build = lambda: Net(**(OTHERWISE[what] if kind == "model" else {}))  # noqa: E731
    options: dict[str, Any] = {"strict": way != "partial" and what != "not strict"}
    if what == "other rename":
        options["rename"] = {r"^layers\.0\.": "layers.1.", r"^layers\.1\.": "layers.0."}
    path = f"../other/{FILE}" if what == "other path" else FILE
    program = _plain if strategy.startswith("plain") else _fabric
    deed = ACTS[what] if kind == "act" else None
    return program(strategy.removeprefix("plain "), way, io, what, path, build, options, models, deed, example.call)


def _fabric(
    strategy: str,
    way: str,
    io: Any,
    what: str,
    path: str,
    build: Callable[[], nn.Module],
    options: dict[str, Any],
    models: list[nn.Module],
    deed: Callable[[], Any] | None,
    call: int,
) -> str:
    fabric = _launched(strategy, io)
    if deed is not None:
        at_call(call, deed)
    declared = way in ("declared", "partial", "broadcast")
    block = {"checkpoint": path, **options} if declared else {"empty_init": True}
    if what == "skips the block" or what == "eager":
        models.append(build())
        fabric.setup(models[0])
        return _digest(models[0])
    with fabric.init_module(**({} if what == "eager" else block)):
        models.append(build())
    if what == "leaves early":
        return ""
    if what == "builds twice":
        with fabric.init_module(**block):
            models.append(build())
    if way == "init_missing":
        fabric.init_missing(models[-1])
    if strategy.startswith("deepspeed"):
        optimizer = torch.optim.SGD(models[-1].parameters(), lr=0.1)
        model, _ = fabric.setup(models[-1], optimizer)
    else:
        model = fabric.setup(models[-1])
    models.append(model)
    if way == "load_state_dict":
        fabric.load_raw(path, model)
    if way == "init in setup":
        fabric.init_missing(model)
    return _digest(model)


def _launched(strategy: str, io: Any) -> Fabric:
    chosen: Any = {
        "ddp": lambda: DDPStrategy(timeout=TIMEOUT),
        "fsdp2": lambda: FSDP2Strategy(timeout=TIMEOUT),
        "fsdp": lambda: FSDPStrategy(timeout=TIMEOUT),
        "deepspeed_stage_2": lambda: DeepSpeedStrategy(stage=2, timeout=TIMEOUT),
        "deepspeed_stage_3": lambda: DeepSpeedStrategy(stage=3, timeout=TIMEOUT),
    }[strategy]()
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=chosen, io=io)
    if isinstance(chosen, DeepSpeedStrategy):
        prepare_deepspeed(chosen)
    fabric.launch()
    return fabric


def _plain(
    strategy: str,
    way: str,
    io: str,
    what: str,
    path: str,
    build: Callable[[], nn.Module],
    options: dict[str, Any],
    models: list[nn.Module],
    deed: Callable[[], Any] | None,
    call: int,
) -> str:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    if deed is not None:
        at_call(call, deed)
    if what in ("skips the block", "eager"):
        model = build()
        models.append(model)
    else:
        with deferred_init():
            model = build()
        models.append(model)
        if what == "leaves early":
            return ""
        if what == "builds twice":
            with deferred_init():
                models.append(build())
            materialize(models[-1])
        if strategy == "fsdp2":
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        if way in ("declared", "partial"):
            materialize(model, checkpoint=path, **options)
        elif way == "load_state_dict" and strategy == "ddp":
            model.load_state_dict(load_file(path))
            init_missing(model)
        else:
            materialize(model)
    if strategy == "ddp":
        models.append(DistributedDataParallel(model))
    return _digest(models[-1] if strategy == "ddp" else model)


def _digest(model: nn.Module) -> str:
    sys.setprofile(None)
    found = weights(model)
    model(torch.ones(2, 6))
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name} {found[name].dtype} {found[name].tolist()}".encode())
    return digest.hexdigest()[:12]


def _wrong_values(model: nn.Module, example: Example, folder: Path) -> list[str]:
    """Names of whole tensors that have values, and others than the model was to get."""
    expected = torch.load(folder / "expected.pt")
    wrong = []
    for name, tensor in model.state_dict().items():
        with suppress(Exception):  # it refuses, as it should; or it is a shard
            if type(tensor) in (Tensor, nn.Parameter) and name in expected and tensor.shape == expected[name].shape:
                if not torch.equal(tensor.cpu(), expected[name]):
                    wrong.append(name)
    return wrong


# -- outside -----------------------------------------------------------------------------------------------------------


def prepare(example: Example, folder: Path) -> dict[str, Tensor]:
    """Write what each rank finds, and return the values that the model is to get."""
    state = values(1)
    if example.way == "partial":
        state = {name: value for name, value in state.items() if not name.startswith("head")}
    for rank in range(example.ranks):
        node = folder / f"node {rank}"
        node.mkdir()
        save_file(state, node / FILE)
        os.utime(node / FILE, (0, 0))
    (folder / "other").mkdir()
    save_file(values(2), folder / "other" / FILE)
    if example.fault[0] == "file":
        _spoil(folder / f"node {example.odd}" / FILE, example.fault[1], state)
    torch.manual_seed(5)
    if example.way in ("declared", "broadcast", "load_state_dict"):
        model: nn.Module = Net()
        model.load_state_dict(state)
    else:
        with deferred_init():
            model = Net()
        materialize(model)
        model.load_state_dict(state if example.way == "partial" else {}, strict=False)
    return weights(model)


def _spoil(path: Path, how: str, state: dict[str, Tensor]) -> None:
    state = {name: value.clone() for name, value in state.items()}
    first = next(iter(state))
    if how == "missing":
        path.unlink()
    elif how == "other":
        save_file({name: value + 1 for name, value in state.items()}, path)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 9)
    elif how == "one element":
        last = sorted(state)[len(state) // 2]
        state[last].view(-1)[state[last].numel() // 2] += 1
        save_file(state, path)
    elif how == "one key fewer":
        del state[first]
        save_file(state, path)
    elif how == "other dtype":
        save_file({name: value.bfloat16() for name, value in state.items()}, path)
    elif how == "copied":
        os.utime(path)


def run(seed: int, folder: Path) -> Answer:
    """Run the example on its ranks, and judge it."""
    example = Example.of(seed)
    expected = prepare(example, folder)
    torch.save(expected, folder / "expected.pt")
    digest = hashlib.sha256()
    for name in sorted(expected):
        digest.update(f"{name} {expected[name].dtype} {expected[name].tolist()}".encode())
    start = time.monotonic()
    outcomes = try_ranks(example.ranks, run_rank, seconds=2 * SECONDS, seed=seed, folder=folder)
    outcome, why = judge(example, outcomes, digest.hexdigest()[:12])
    return Answer(outcome, why, time.monotonic() - start)


def judge(example: Example, outcomes: Sequence[Outcome], expected: str) -> tuple[str, str]:
    """Say what came of an example, and why."""
    deadly = example.fault[1] in DEADLY
    found = {o.rank: o.value for o in outcomes if isinstance(o.value, dict)}
    for o in outcomes:
        if o.rank not in found and not (deadly and o.rank == example.odd):
            hung = "SIGKILL" in o.error
            return (HUNG if hung else UNCLEAR), f"rank {o.rank}: {o.error[-300:]} {o.output[-1500:]}"
    for rank, each in found.items():
        if each["seconds"] > SECONDS - 6:
            return HUNG, f"rank {rank} took {each['seconds']:.0f} s: {each['error']}: {each['message']}"
        if each.get("usable"):
            return SILENT, f"rank {rank} failed ({each['message']}), and has other values in {each['usable'][:3]}"
        if each["digest"] and each["digest"] != expected:
            return SILENT, f"rank {rank} has a model of other values, and no error"
    errors = {rank: each for rank, each in found.items() if each["error"]}
    if not errors and len(found) == len(outcomes):
        return SURVIVED, ""
    own = [each for rank, each in errors.items() if rank != example.odd]
    foreign = [each for each in own if not each["ours"]]
    if foreign:
        return UNCLEAR, f"{foreign[0]['error']}: {foreign[0]['message']}"
    if example.odd in errors and not errors[example.odd]["ours"] and not _is_injected(example, errors[example.odd]):
        return UNCLEAR, f"rank {example.odd}: {errors[example.odd]['error']}: {errors[example.odd]['message']}"
    text = "; ".join(f"rank {rank}: {each['error']}: {each['message'][:160]}" for rank, each in errors.items())
    return CLEAR, text


def _is_injected(example: Example, found: dict[str, Any]) -> bool:
    own = {"an exception": InjectedError.__name__, "Ctrl-C": "KeyboardInterrupt", "out of descriptors": "OSError"}
    what = example.fault[1]
    return found["error"] == own.get(what, what) or what in ("out of descriptors", "out of threads")
