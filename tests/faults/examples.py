"""One example: a strategy, a way to values, and a fault on one rank; and what came of it."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
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

from fabric_init import Fabric, FabricInitError, UninitializedTensorError, deferred_init, materialize
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

STRATEGIES = {
    "ddp": 6,
    "fsdp2": 8,
    "fsdp": 2,
    "deepspeed_stage_2": 1,
    "deepspeed_stage_3": 2,
    "plain fsdp2": 4,
    "plain ddp": 3,
}
DECLARED = ("declared", "partial", "broadcast")
WHOLE = ("ddp", "plain ddp", "deepspeed_stage_2")
WAYS = ("declared", "partial", "broadcast", "init_missing", "load_state_dict", "init in setup")
ELSEWHERE = {
    "plain ddp": ("broadcast", "init in setup", "load_state_dict"),  # the last has no step that ranks make together
    "plain fsdp2": ("broadcast", "init in setup", "load_state_dict"),
    "fsdp": ("load_state_dict",),  # through hooks of its own
    "deepspeed_stage_2": ("load_state_dict",),
    "deepspeed_stage_3": ("load_state_dict",),
}
"""Ways that a strategy has not."""
FILES = ("missing", "other", "truncated", "one element", "one key fewer", "other dtype", "copied")
OPTIONS = ("other way", "other rename", "not strict", "other seed", "other path")
OPTIONS_OF_FABRIC = (*OPTIONS, "other strategy", "other io", "eager")
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
        ways = [way for way in WAYS if way not in ELSEWHERE.get(strategy, ())]
        ranks = rng.choice((2, 2, 3))
        kind = rng.choices(("act", "file", "model", "option", "order"), (10, 4, 3, 3, 2))[0]
        options = OPTIONS_OF_FABRIC if "plain" not in strategy else OPTIONS
        names = {"act": ACTS, "file": FILES, "model": OTHERWISE, "option": options, "order": ORDERS}[kind]
        way = rng.choice(ways[:3] if kind == "file" else ways)
        call = int(math.exp(rng.uniform(0, math.log(3000))))
        odd, what = rng.randrange(ranks), rng.choice(list(names))
        if (way, what) == ("load_state_dict", "other path"):
            way = "declared"  # each rank takes its parts of what its own program has read, and nobody compares that
        return cls(seed, strategy, way, ranks, odd, (kind, what), call)

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


@dataclass
class Part:
    """What one rank does in an example. ``models`` are those that it has recorded so far."""

    example: Example
    is_odd: bool
    models: list[nn.Module] = field(default_factory=list)

    @property
    def what(self) -> str:
        return self.example.fault[1] if self.is_odd else ""

    @property
    def strategy(self) -> str:
        others = {"ddp": "fsdp2", "plain ddp": "plain fsdp2", "plain fsdp2": "plain ddp"}
        chosen = self.example.strategy
        return others.get(chosen, "ddp") if self.what == "other strategy" else chosen

    @property
    def way(self) -> str:
        if self.what != "other way":
            return self.example.way
        return "declared" if self.example.way not in DECLARED else "init_missing"

    @property
    def io(self) -> str:
        return "broadcast" if (self.way == "broadcast") != (self.what == "other io") else "local"

    @property
    def block(self) -> dict[str, Any]:
        """The arguments of its block."""
        if self.way not in DECLARED:
            return {}
        options: dict[str, Any] = {"strict": self.way != "partial" and self.what != "not strict"}
        if self.what == "other rename":
            options["rename"] = [
                {r"^layers\\.0\\.": "layers.3."},
                {r"^layers\\.1\\.": "layers.0."},
                {r"^layers\\.3\\.": "layers.1."},
            ]
        return {"checkpoint": self.path, **options}

    @property
    def path(self) -> str:
        return f"../other/{FILE}" if self.what == "other path" else FILE

    def build(self) -> nn.Module:
        return Net(**(OTHERWISE[self.what] if self.is_odd and self.example.fault[0] == "model" else {}))

    def begin(self) -> None:
        """The process group is there: from here on the fault may happen."""
        torch.manual_seed(7 if self.what == "other seed" else 5)
        if self.is_odd and self.example.fault[0] == "act":
            at_call(self.example.call, ACTS[self.what])

    def second(self, now: bool) -> bool:
        """Whether another model is built now, before or after the first one."""
        return self.example.fault[1] == "two models in another order" and now == self.is_odd


def run_rank(seed: int, folder: Path) -> dict[str, Any]:
    """What this rank ends in; it lives until all others have ended, too, or have had the time to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    example, rank = Example.of(seed), int(os.environ["RANK"])
    part, start = Part(example, rank == example.odd), time.monotonic()
    found: dict[str, Any] = {"error": "", "message": "", "digest": ""}
    os.chdir(folder / f"node {rank}")
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        found["digest"] = _plain(part) if part.strategy.startswith("plain") else _fabric(part)
    except BaseException as error:
        found.update(error=type(error).__name__, message=" ".join(str(error).split())[:600])
        found["ours"] = isinstance(error, FabricInitError)
    sys.setprofile(None)
    resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)
    found["seconds"] = time.monotonic() - start
    if found["error"]:
        found["usable"] = [wrong for model in part.models for wrong in _wrong_values(model, folder)]
    (folder / f"ended {rank}").touch()
    alive = example.ranks - (example.fault[1] in DEADLY)
    while time.monotonic() < start + SECONDS - 4 and len(list(folder.glob("ended *"))) < alive:
        time.sleep(0.05)
    return found


def _fabric(part: Part) -> str:
    fabric = _launched(part.strategy, part.io)
    read = load_file(part.path) if part.way == "load_state_dict" else {}  # where a fault would be the program's own
    part.begin()
    block = part.block or {"empty_init": True}
    if part.what in ("skips the block", "eager"):
        with fabric.init_module() if part.what == "eager" else nullcontext():
            eager = part.build()
        fabric.setup(eager)
        return ""
    if part.second(True):
        with fabric.init_module(empty_init=True):
            fabric.init_missing(nn.Linear(2, 2))
    with fabric.init_module(**block):
        part.models.append(part.build())
    if part.second(False):
        with fabric.init_module(empty_init=True):
            nn.Linear(2, 2)
    if part.what == "leaves early":
        return ""
    if part.what == "builds twice":
        with fabric.init_module(**block):
            part.models.append(part.build())
    model = part.models[-1]
    if part.way == "init_missing":
        fabric.init_missing(model)
    if part.strategy.startswith("deepspeed"):
        model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    else:
        model = fabric.setup(model)
    part.models.append(model)
    if part.way == "load_state_dict":
        model.load_state_dict(read)
    if part.way == "init in setup":
        fabric.init_missing(model)
    return _digest(model)


def _plain(part: Part) -> str:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    part.begin()
    is_sharded = part.strategy == "plain fsdp2"
    if part.what in ("skips the block", "eager"):
        DistributedDataParallel(part.build())
        return ""
    if part.second(True):
        _materialized(lambda: nn.Linear(2, 2))
    if part.what == "builds twice":
        part.models.append(_materialized(part.build))
    with deferred_init():
        model = part.build()
    part.models.append(model)
    if part.second(False):
        _materialized(lambda: nn.Linear(2, 2))
    if part.what == "leaves early":
        return ""
    for module in (*model.layers, model) if is_sharded else ():
        fully_shard(module)
    materialize(model, **part.block)
    return _digest(model if is_sharded else DistributedDataParallel(model))


def _materialized(build: Callable[[], nn.Module]) -> nn.Module:
    with deferred_init():
        model = build()
    materialize(model)
    return model


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


def _digest(model: nn.Module) -> str:
    sys.setprofile(None)
    found = weights(model)
    model(torch.ones(2, 6))
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name} {found[name].dtype} {found[name].tolist()}".encode())
    return digest.hexdigest()[:12]


def _wrong_values(model: nn.Module, folder: Path) -> list[str]:
    """Names of whole tensors that have values, and others than the model was to get."""
    expected = torch.load(folder / "expected.pt")
    wrong: list[str] = []
    try:
        state = model.state_dict()
    except UninitializedTensorError:  # left in parts by what has failed: it refuses as a whole
        return wrong
    for name, tensor in state.items():
        with suppress(Exception):  # it refuses, as it should; or it is a shard
            is_whole = type(tensor) in (Tensor, nn.Parameter) and tensor.shape == expected[name].shape
            if is_whole and not torch.equal(tensor.cpu(), expected[name]):
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
    torch.manual_seed(7 if example.fault[1] == "other seed" and example.odd == 0 else 5)
    if example.way in ("declared", "broadcast", "load_state_dict"):
        model: nn.Module = Net()
        model.load_state_dict(state)
    else:
        if example.fault[1] == "two models in another order" and example.odd == 0:  # all have the seed of rank 0
            _materialized(lambda: nn.Linear(2, 2))
        model = _materialized(Net)
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
        if each.get("usable") and not _is_rank_zeros(example):
            return SILENT, f"rank {rank} failed ({each['message']}), and has other values in {each['usable'][:3]}"
        if each["digest"] not in ("", expected) and not _is_rank_zeros(example):
            return SILENT, f"rank {rank} has a model of other values, and no error"
    if len({each["digest"] for each in found.values() if each["digest"]}) > 1:
        return SILENT, "the ranks have models of different values, and no error"
    errors = {rank: each for rank, each in found.items() if each["error"]}
    if not errors and len(found) == len(outcomes):
        return SURVIVED, ""
    own = [each for rank, each in errors.items() if rank != example.odd]
    foreign = [each for each in own if not each["ours"]]
    if foreign:
        return UNCLEAR, f"{foreign[0]['error']}: {foreign[0]['message']}"
    in_own = example.fault[1] in ("skips the block", "eager", "leaves early")  # in a collective of its own program
    if (
        example.odd in errors
        and not errors[example.odd]["ours"]
        and not in_own
        and not _is_injected(example, errors[example.odd])
    ):
        return UNCLEAR, f"rank {example.odd}: {errors[example.odd]['error']}: {errors[example.odd]['message']}"
    text = "; ".join(f"rank {rank}: {each['error']}: {each['message'][:160]}" for rank, each in errors.items())
    return CLEAR, text


def _is_rank_zeros(example: Example) -> bool:
    """Whether all get what rank 0 has made otherwise: so DDP does without us, too."""
    if example.odd or (example.strategy not in WHOLE and example.way != "broadcast"):
        return False
    sent = example.way == "broadcast" and (example.fault[0] == "file" or example.fault[1] == "other path")
    return sent or (example.strategy in WHOLE and example.fault[0] in ("model", "file"))


def _is_injected(example: Example, found: dict[str, Any]) -> bool:
    own = {"an exception": InjectedError.__name__, "Ctrl-C": "KeyboardInterrupt", "out of descriptors": "OSError"}
    what = example.fault[1]
    return found["error"] == own.get(what, what) or what in ("out of descriptors", "out of threads")
