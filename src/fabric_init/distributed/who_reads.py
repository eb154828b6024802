"""Open a checkpoint on all ranks: each reads what it keeps, or rank 0 reads and broadcasts."""

from __future__ import annotations

from typing import Literal, get_args

import torch.distributed as dist

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.fingerprint import content_checksums, files_digest, header_digest
from fabric_init.checkpoints.storage.file_system import file_system_of, is_network
from fabric_init.distributed.agreement import Agreement, SingleProcess
from fabric_init.distributed.broadcast import BroadcastReader
from fabric_init.option_names import Io
from fabric_init.planning.checkpoint_source import CheckpointSource

BUDGET = 64 << 20  # bytes; with more, reading took as long


def check_io(io: Io) -> Io:
    """Return ``io`` if it is valid.

    Raises:
        ValueError: It is not.
    """
    if io not in get_args(Io):
        raise ValueError(
            f"io={io!r}: give 'local' (each rank reads what it keeps), 'broadcast' (rank 0 reads each tensor once and "
            "sends it to the others) or 'auto'"
        )
    return io


def choose_io(io: Io, *, whole: bool, machines: int, file_system: str | None) -> Literal["local", "broadcast"]:
    """Return how to read a checkpoint; ``io="auto"`` leaves the choice to this function.

    One reader pays where the same bytes would go to several machines over a network: ranks of one machine share what
    it has read, and ranks that keep shards read each byte once in total.

    Args:
        io: The user's choice.
        whole: Whether every rank keeps full tensors.
        machines: The number of machines that the ranks are on.
        file_system: The type of the file system that the checkpoint is on.
    """
    if io != "auto":
        return io
    return "broadcast" if whole and machines > 1 and is_network(file_system) else "local"


def open_on_all_ranks(
    source: CheckpointSource,
    io: Io,
    *,
    whole: bool,
    machines: int,
    agreement: Agreement,
) -> CheckpointReader:
    """Open ``source`` in the same way on every rank, which rank 0 chooses if ``io="auto"``; ``io`` is that of all.

    Raises:
        CheckpointError: The checkpoint cannot be used; on the other ranks, :class:`FabricInitError` with its message.
        RanksDisagreeError: The content of the file, where each rank reads it, differs between ranks.
    """
    if isinstance(agreement, SingleProcess):
        return source.open()
    way = choose_io(io, whole=whole, machines=machines, file_system=file_system_of(source.path))
    if agreement.from_rank_zero(way) == "local":
        return _opened_alike(source, agreement)
    # not mapped: rank 0 reads everything, from front to back, and a file that changes is an error, not a crash
    return BroadcastReader.open(lambda: source.open(copy=True), agreement, BUDGET)


def _opened_alike(source: CheckpointSource, agreement: Agreement) -> CheckpointReader:
    """Open what each rank reads by itself: the same files, or else other files of the same content."""
    reader = agreement.run_together("opening the checkpoint", source.open, header_digest)
    with agreement.telling("comparing the checkpoints"):
        files = files_digest(reader)
        if not agreement.alike(files):
            content = _content(reader, files, agreement)
            agreement.run_together("the content of the checkpoint", lambda: content, dict)
    return reader


def _content(reader: CheckpointReader, files: str | None, agreement: Agreement) -> dict[str, str]:
    """Return checksums of all values that this rank would read; ranks with the same ``files`` share the work."""
    own = f"{dist.get_rank()} {files}"
    ranks = agreement.from_all([own])
    sharing = [rank for rank in ranks if files is not None and rank.partition(" ")[2] == files] or [own]
    found = content_checksums(reader, sharing.index(own), len(sharing))
    first = sharing[0].partition(" ")[0]
    lines = agreement.from_all([f"{first}\t{checksum}\t{key}" for key, checksum in found.items()])
    ours = [line.split("\t", 2) for line in lines if line.partition("\t")[0] == first]
    return {key: checksum for _, checksum, key in sorted(ours)}
