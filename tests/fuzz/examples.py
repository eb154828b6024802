"""Runs in a child process: damages a checkpoint, opens and reads it, and says what was wrong with what came of it."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from fabric_init.checkpoints import Box, CheckpointReader, Region, Span, open_checkpoint, take
from fabric_init.errors import CheckpointError
from fabric_init.tools.inspect import inspect
from tests.fuzz.mutations import mutate

SECONDS = 20.0
"""For one example; a good one takes milliseconds, and other programs may be running."""
MEMORY_BYTES = 1 << 30
"""How much address space an example may take; the good checkpoints have 20 KB."""
READ_WHOLE_BYTES = 1 << 22
"""A tensor that says it is larger is read in parts: `read` may take what `spec` says."""
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "bad_alloc")


@dataclass
class Outcome:
    """What came of some examples."""

    ran: int = 0
    refused: int = 0
    caught: int = 0
    """Opened and read without a manifest, refused with it."""
    slowest: float = 0.0
    grown_bytes: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A checkpoint to damage."""

    name: str
    pristine: Path
    """Its folder."""
    opens: str
    """What to open in it."""
    manifest: Path
    damaged: tuple[str, ...] = ()
    """The files to damage; all, if none are named."""
    url: bool = False


def run_examples(case: Case, folder: Path, numbers: list[int]) -> dict[str, Any]:
    """The examples of these numbers that are this rank's; ``folder`` gets a file that says which one runs."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    outcome = Outcome()
    with (folder / f"running-{rank}").open("wb", buffering=0) as running:
        copy = Copy(case, folder / f"copy-{rank}")
        good = read_all(open_checkpoint(copy.path), Random(0))
        _limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in numbers[rank::ranks]:
            os.pwrite(running.fileno(), b"%-20d" % number, 0)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            start = time.monotonic()
            run_example(case, copy, number, good, outcome)
            outcome.slowest = max(outcome.slowest, time.monotonic() - start)
            faulthandler.cancel_dump_traceback_later()
            if len(outcome.wrong) >= 5:
                break
    outcome.grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return asdict(outcome)  # plain data: this file is another module in the parent process


def run_example(case: Case, copy: Copy, number: int, good: Mapping[str, torch.Tensor], outcome: Outcome) -> None:
    rng = Random(f"{case.name} {number}")
    sums = copy.folder / case.manifest  # one outside stays as it is
    copy.damage(rng)
    outcome.ran += 1
    refused = False
    for manifest in (None, sums):
        try:
            found = read_all(open_checkpoint(copy.path, mmap=rng.random() < 0.5, manifest=manifest), rng)
        except CheckpointError as error:
            why = wrong_refusal(error, case)
            outcome.refused += manifest is None
            outcome.caught += manifest is not None and not refused
            refused = True
        except BaseException:
            why = traceback.format_exc(limit=-8)
        else:
            why = None if manifest is None else difference(found, good)
        if manifest is None:
            why = why or wrong_inspection(copy.path, case, refused)
        if why is not None:
            changed = ", ".join(copy.changed)
            outcome.wrong.append(f"example {number}, damage to {changed}, manifest {manifest is not None}: {why}")


def wrong_refusal(error: CheckpointError, case: Case) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(text in str(cause) for text in OUT_OF_MEMORY):
            return "memory without bound: " + "".join(traceback.format_exception(error, limit=-6))
        cause = cause.__cause__ or cause.__context__
    name = "memory://" if case.url else "copy-"
    if name not in str(error) and case.manifest.name not in str(error):
        return f"an error that does not name the file: {error}"
    return None


def wrong_inspection(path: str | Path, case: Case, refused: bool) -> str | None:
    """Whatever is there, it says what; and nothing that cannot be read is sound."""
    try:
        contents = inspect(path, values=True)
        json.dumps(contents.to_dict(), allow_nan=False)
    except CheckpointError as error:
        return wrong_refusal(error, case) if refused else f"read, yet not inspected: {error}"
    except BaseException:
        return traceback.format_exc(limit=-8)
    if not refused or not contents.sound:
        return None
    try:  # damage may make two state dicts of one: each is read by its name then
        for entry in contents.entries if len(contents.entries) > 1 else [None]:
            read_all(open_checkpoint(path, entry=entry), Random(0))
    except CheckpointError as error:
        return f"sound to inspect, yet it cannot be read: {error}"
    return None


def difference(found: Mapping[str, torch.Tensor], good: Mapping[str, torch.Tensor]) -> str | None:
    """What a read under a manifest has brought that it should not have."""
    for key in found.keys() | good.keys():
        if key not in found or key not in good:
            return f"with the manifest, {key!r} {'was added' if key in found else 'is gone'}"
        if found[key].dtype != good[key].dtype or found[key].shape != good[key].shape:
            return f"with the manifest, {key!r} is another tensor"
        if not equal_bits(found[key], good[key]):
            return f"with the manifest, {key!r} has other values"
    return None


def read_all(reader: CheckpointReader, rng: Random) -> dict[str, torch.Tensor]:
    """Each tensor, and some regions of it: those must be the same parts of the whole."""
    found = {}
    assert reader.format
    _ = reader.extra_state
    for key in reader.keys():
        spec = reader.spec(key)
        whole = None
        if spec.shape.numel() * spec.dtype.itemsize <= READ_WHOLE_BYTES:
            whole = found[key] = reader.read(key)
            assert (whole.shape, whole.dtype) == (spec.shape, spec.dtype), "not what spec says"
        for region in regions(rng, tuple(spec.shape)):
            part = reader.read(key, region)
            assert part.numel() == region.numel, f"{region} has {part.numel()} elements"
            assert whole is None or equal_bits(part, take(whole, region)), f"{region} of {key!r} is not that of it"
    return found


def regions(rng: Random, shape: tuple[int, ...]) -> Iterator[Region]:
    """A span and a box inside ``shape``; of a large tensor small ones."""
    numel = math.prod(shape)
    start = rng.randint(0, numel)
    yield Span(start, rng.randint(start, min(numel, start + 100_000)))
    longest = 10 if numel > 100_000 else 100_000
    offsets = tuple(rng.randint(0, size) for size in shape)
    sizes = (rng.randint(0, min(size - at, longest)) for at, size in zip(offsets, shape, strict=True))
    box = Box(offsets, tuple(sizes))
    if box.numel <= 1_000_000:
        yield box


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() == other.numel() and _bytes(one) == _bytes(other)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Copy:
    """A copy of the checkpoint, damaged anew for each example; in the end it is as the last example left it."""

    def __init__(self, case: Case, folder: Path) -> None:
        shutil.copytree(case.pristine, folder)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        self._all = {name: (folder / name).read_bytes() for name in names}
        self._damaged = {name: data for name, data in self._all.items() if name in (case.damaged or names)}
        self.folder, self._url = folder, case.url
        self.path = f"memory://{folder.name}/{case.opens}".removesuffix("/.") if case.url else folder / case.opens
        self.changed: tuple[str, ...] = ()
        if case.url:
            for name, data in self._all.items():
                self._write(name, data)

    def damage(self, rng: Random) -> None:
        for name in self.changed:
            self._write(name, self._all[name])
        changes = mutate(self._damaged, rng)
        for name, data in changes.items():
            self._write(name, data)
        self.changed = tuple(changes)

    def _write(self, name: str, data: bytes | None) -> None:
        if self._url:
            import fsspec

            files = fsspec.filesystem("memory")
            path = f"/{self.folder.name}/{name}"
            if data is not None:
                files.pipe(path, data)
            elif files.exists(path):
                files.rm(path)
            return
        # A new file: the old one may still be mapped by a reader.
        (self.folder / name).unlink(missing_ok=True)
        if data is not None:
            (self.folder / name).write_bytes(data)
