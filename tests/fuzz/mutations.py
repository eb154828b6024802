"""Damage to files, chosen by a seeded generator: blind to what they are, and with an eye on JSON, pickles and zip."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from random import Random
from typing import Any, NamedTuple

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
NUMBERS += [2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [None, True, -1, 1.5, "", "x", "..", "../x", "a\0b", [], [0], {}, "F32", "BOOL", "F4", *NUMBERS]


def mutate(files: Mapping[str, bytes], rng: Random) -> dict[str, bytes | None]:
    """New content for one or two of ``files``; ``None``: the file goes."""
    name = rng.choice(sorted(files))
    if rng.random() < 0.04:
        return _exchange(files, name, rng)
    data = files[name]
    if (edit := _structured(name, data)) and rng.random() < 0.6:
        data = edit(data, rng)
        if rng.random() < 0.8:
            return {name: data}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(BLIND)(data, rng)
    return {name: data}


def _exchange(files: Mapping[str, bytes], name: str, rng: Random) -> dict[str, bytes | None]:
    other = rng.choice(sorted(files))
    return rng.choice([{name: None}, {name: b""}, {name: files[other]}, {name: files[other], other: files[name]}])


# -- blind -------------------------------------------------------------------------------------------------------------


def _range(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice([1, 2, 4, 8, 16, 64, 256]))


def flip_bits(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4]) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + rng.choice([rng.randbytes(stop - start), bytes(stop - start)]) + data[stop:]


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def extend(data: bytes, rng: Random) -> bytes:
    return data + rng.choice([rng.randbytes(rng.randrange(1, 100)), bytes(8), data])


def delete(data: bytes, rng: Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def splice(data: bytes, rng: Random) -> bytes:
    """A piece of the file, inserted or put over another place."""
    start, stop = _range(data, rng)
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[start:stop] + data[at + rng.choice([0, stop - start]) :]


def number(data: bytes, rng: Random) -> bytes:
    """A field of 1 to 8 bytes that says how long something is, or where."""
    width = rng.choice([1, 2, 4, 8])
    # Where files have such fields: at the start, or in the directory at the end of an archive.
    at = rng.choice([0, rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 100))])
    value = rng.choice([*NUMBERS, len(data), len(data) - 1, len(data) + 1]) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


BLIND = [flip_bits, flip_bits, overwrite, cut, extend, delete, splice, number, number]

# -- with an eye on what it is -----------------------------------------------------------------------------------------

Edit = Callable[[bytes, Random], bytes]


def _structured(name: str, data: bytes) -> Edit | None:
    if name.endswith(".json"):
        return edit_json
    if data[8:9] == b"{":
        return edit_safetensors
    if data.startswith(b"\x80"):
        return edit_pickle
    if b"PK\x03\x04" in data[:4]:
        return edit_archive
    return None


def edit_json(data: bytes, rng: Random) -> bytes:
    """Another value, name or none at all somewhere in the JSON; a name twice."""
    content = json.loads(data)
    inside = content
    while isinstance(inside, dict) and inside:
        key = rng.choice(sorted(inside))
        if isinstance(inside[key], (dict, list)) and inside[key] and rng.random() < 0.8:
            inside = inside[key]
            continue
        how = rng.randrange(4)
        if how == 0:
            inside[key] = rng.choice(VALUES)
        elif how == 1:
            inside[rng.choice(["x", "", "__metadata__", "\ud800", key + "\0", *sorted(inside)])] = inside[key]
        elif how == 2:
            del inside[key]
        else:
            other = rng.choice(sorted(inside))
            inside[key], inside[other] = inside[other], inside[key]
        break
    else:
        if isinstance(inside, list):
            inside[rng.randrange(len(inside))] = rng.choice(VALUES)
    text = json.dumps(content)
    return text.replace('"x":', rng.choice(['"x":', '"n":'])).encode()


def edit_safetensors(data: bytes, rng: Random) -> bytes:
    """An edited header with the right length before it."""
    stop = 8 + struct.unpack("<Q", data[:8])[0]
    header = edit_json(data[8:stop], rng)
    return struct.pack("<Q", len(header)) + header + data[stop:]


class Op(NamedTuple):
    name: str
    start: int
    stop: int


def edit_pickle(data: bytes, rng: Random) -> bytes:
    """One of the pickles that follow one another in the file: an instruction is changed, doubled, left out or moved."""
    ops = ops_of(data)
    if not ops:
        return flip_bits(data, rng)
    op, other = rng.choice(ops), rng.choice(ops)
    numbers = [op for op in ops if op.name in ("BININT", "BININT1", "BININT2", "LONG1")]
    if numbers and rng.random() < 0.5:
        op = rng.choice(numbers)
        value = rng.choice([*NUMBERS, -1])
        return data[: op.start] + b"\x8a\x09" + value.to_bytes(9, "little", signed=True) + data[op.stop :]
    replaced = rng.choice([b"", data[other.start : other.stop], data[op.start : op.stop] * 2])
    return data[: op.start] + replaced + data[op.stop :]


@cache
def ops_of(data: bytes) -> tuple[Op, ...]:
    """The instructions of the pickles at the start of ``data``."""
    found: list[Op] = []
    start = 0
    try:
        while data[start : start + 1] == b"\x80":
            ops = list(pickletools.genops(data[start:]))
            places = [start + int(at or 0) for _, _, at in ops]
            stops = [*places[1:], places[-1] + 1]
            found += [Op(op.name, at, stop) for (op, _, _), at, stop in zip(ops, places, stops, strict=True)]
            start = stops[-1]
    except ValueError:
        pass
    return tuple(found)


def edit_archive(data: bytes, rng: Random) -> bytes:
    """The pickle of an archive, its checksum put right; of several archives one after the other, one of them."""
    start, stop = rng.choice(pickles_in(data))
    pickle = data[start:stop]
    is_alone = data.count(b"PK\x05\x06") == 1
    if is_alone and rng.random() < 0.6:
        return _rebuilt(data, edit_pickle(pickle, rng))
    changed = flip_bits(pickle, rng)
    if rng.random() < 0.5:
        ops = [op for op in ops_of(pickle) if op.stop - op.start < 9]
        op = rng.choice(ops)
        same = [other for other in ops if other.stop - other.start == op.stop - op.start]
        other = rng.choice(same)
        changed = pickle[: op.start] + pickle[other.start : other.stop] + pickle[op.stop :]
    data = data[:start] + changed + data[stop:]
    before, after = (struct.pack("<I", zlib.crc32(content)) for content in (pickle, changed))
    return data.replace(before, after)


@cache
def pickles_in(data: bytes) -> tuple[tuple[int, int], ...]:
    """Where each ``data.pkl`` lies in archives that follow one another."""
    found = []
    at = data.find(b"PK\x03\x04")
    while at >= 0:
        name, extra = struct.unpack("<HH", data[at + 26 : at + 30])
        start = at + 30 + name + extra
        if data[at + 30 : at + 30 + name].endswith(b"/data.pkl"):
            *_, (_, _, last) = pickletools.genops(data[start:])
            found.append((start, start + int(last or 0) + 1))
        at = data.find(b"PK\x03\x04", at + 1)
    return tuple(found)


def _rebuilt(data: bytes, pickle: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = pickle if info.filename.endswith("/data.pkl") else old.read(info)
            new.writestr(zipfile.ZipInfo(info.filename), content)
    return out.getvalue()
