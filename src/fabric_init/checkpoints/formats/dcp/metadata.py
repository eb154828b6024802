"""Parse the ``.metadata`` of a ``torch.distributed.checkpoint`` folder: tensors, their chunks, and the files of these.

The format: a pickled ``Metadata`` of
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py. It is read as plain data; no
class of torch is made from it, so that its version does not matter either.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fabric_init.checkpoints.formats.dcp.contents import Chunk, Contents, Item, TensorEntry
from fabric_init.checkpoints.formats.pickles.plain_data import Record, RestrictedPickleError, load_inert
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box, is_below, overlap
from fabric_init.checkpoints.state_dicts import Location
from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.errors import CheckpointFormatError

# 10,000 tensors in 512 chunks each come to about this much.
_METADATA_BYTES = 1 << 30

_CLASSES = "torch.distributed.checkpoint.metadata."
_METADATA, _TENSOR, _BYTES = (f"{_CLASSES}{n}" for n in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata"))
_CHUNK, _INDEX = f"{_CLASSES}ChunkStorageMetadata", f"{_CLASSES}MetadataIndex"
_FILE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_BEFORE_2_3 = "torch.distributed._shard.sharded_tensor.metadata."
_PROPERTIES = f"{_CLASSES}TensorProperties", f"{_BEFORE_2_3}TensorProperties"
_STRIDED = "torch.serialization._get_layout", ("torch.strided",)
_NAMES = frozenset(
    {_METADATA, _TENSOR, _BYTES, _CHUNK, _INDEX, *_PROPERTIES, _FILE, _STRIDED[0], "torch.Size"}
    | {f"{_CLASSES}StorageMeta", f"{_CLASSES}_MEM_FORMAT_ENCODING", f"{_BEFORE_2_3}MEM_FORMAT_ENCODING"}
    | {"collections.OrderedDict"}
    | {f"{m}.{kind}Path" for m in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows", "PurePosix", "")}
)


def read_metadata(path: Path) -> Contents:
    """Return the contents that the ``.metadata`` at ``path`` declares.

    Raises:
        CheckpointFormatError: it is not what torch writes, names what could run code, or the chunks of a tensor leave
            a gap, overlap or stick out.
    """
    file = open_bytes(path, mmap=False)
    if file.size > _METADATA_BYTES:
        raise CheckpointFormatError(f"{path} has {file.size:,} bytes; metadata has at most {_METADATA_BYTES:,}.")
    try:
        return _contents(load_inert(file.head(file.size), _NAMES))
    except _WrongError as error:
        raise CheckpointFormatError(f"{path}: {error}.") from None
    except RestrictedPickleError as error:
        raise CheckpointFormatError(
            f"{path} is not the metadata of torch.distributed.checkpoint: {error}. Nothing in it was run."
        ) from error


class _WrongError(ValueError):
    """An error in the metadata. The caller adds the name of the file."""


def _contents(loaded: object) -> Contents:
    metadata = _fields(loaded, _METADATA)
    items: dict[tuple[str, tuple[int, ...] | None], Item] = {}
    for index, info in _typed(metadata.get("storage_data"), dict, "storage_data").items():
        fields = _fields(index, _INDEX)
        offset = fields.get("offset")
        place = None if offset is None else _size(offset, "an offset")
        items[_typed(fields.get("fqn"), str, "a key"), place] = _item(info)
    where = metadata.get("planner_data")
    where = where if isinstance(where, dict) else {}
    contents = Contents({}, {})
    for item in items.values():
        contents.ends[item.file] = max(contents.ends.get(item.file, 0), item.offset + item.length)
    for key, entry in _typed(metadata.get("state_dict_metadata"), dict, "state_dict_metadata").items():
        location, name = _place(_typed(key, str, "a key"), where.get(key))
        if isinstance(entry, Record) and entry.name == _BYTES:
            if (key, None) in items:
                contents.objects[key] = location, name, items[key, None]
            continue
        contents.tensors[key] = TensorEntry(location, name, *_tensor(key, _fields(entry, _TENSOR), items))
    return contents


def _place(key: str, path: object) -> tuple[Location, str]:
    """Return location and name of an entry; its key where there is no planner data (``flatten_state_dict=False``)."""
    if not isinstance(path, tuple) or not path or not all(isinstance(part, (str, int)) for part in path):
        return (), key
    *location, name = map(str, path)
    return tuple(location), name


def _tensor(
    key: str, fields: dict[Any, Any], items: dict[tuple[str, tuple[int, ...] | None], Item]
) -> tuple[TensorSpec, tuple[Chunk, ...]]:
    # TensorProperties has the state (dtype, layout, requires_grad, memory format, pinned).
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Record) and properties.name in _PROPERTIES else None
    dtype, layout = state[:2] if isinstance(state, tuple) and len(state) > 1 else (None, None)
    if not isinstance(dtype, torch.dtype):
        raise _WrongError(f"tensor {key!r} has no dtype")
    if not isinstance(layout, Record) or (layout.name, layout.arguments) != _STRIDED:
        raise _WrongError(f"tensor {key!r} is not dense: convert it before saving")
    shape = _size(fields.get("size"), f"the size of {key!r}")
    chunks = []
    for chunk in _typed(fields.get("chunks"), list, f"the chunks of {key!r}"):
        parts = _fields(chunk, _CHUNK)
        box = Box(_size(parts.get("offsets"), f"a chunk of {key!r}"), _size(parts.get("sizes"), f"a chunk of {key!r}"))
        if not len(box.offsets) == len(box.sizes) == len(shape):
            raise _WrongError(f"tensor {key!r} of shape {shape} has a chunk of other dimensions, {box}")
        if not box.numel:
            continue  # the shard of a rank that got nothing
        if (key, box.offsets) not in items:
            raise _WrongError(f"nothing says where the chunk of {key!r} at {box.offsets} lies")
        chunks.append(Chunk(box, items[key, box.offsets]))
    _check_tiling(key, shape, [chunk.box for chunk in chunks])
    return TensorSpec(torch.Size(shape), dtype), tuple(chunks)


def _check_tiling(key: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Require chunks that lie inside, do not overlap, and have as many elements as the tensor: they fill it exactly."""
    for box in boxes:
        if any(at + size > full for at, size, full in zip(box.offsets, box.sizes, shape, strict=True)):
            raise _WrongError(f"tensor {key!r} of shape {shape} has a chunk that sticks out, {box}")
    held, numel = sum(box.numel for box in boxes), math.prod(shape)
    if held != numel:
        raise _WrongError(f"tensor {key!r} of shape {shape} has {numel} elements, and its chunks have {held}")
    if len(boxes) < 2:
        return
    # A sweep along the dimension with most cuts, so that few chunks are open at a time.
    along = max(range(len(shape)), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    opened: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[along]):
        opened = [other for other in opened if other.offsets[along] + other.sizes[along] > box.offsets[along]]
        for other in opened:
            if overlap(other, box) is not None:
                raise _WrongError(f"tensor {key!r} has chunks that overlap, {other} and {box}")
        opened.append(box)


def _item(info: object) -> Item:
    fields = _fields(info, _FILE)
    file = _typed(fields.get("relative_path"), str, "a file's name")
    if fields.get("transform_descriptors"):
        raise _WrongError(f"{file!r} was written through extensions (compressed, say) and cannot be read in parts")
    numbers = fields.get("offset"), fields.get("length")
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _WrongError(f"an item of {file!r} has offset and length {numbers!r:.80}")
    return Item(file, *numbers)  # type: ignore[arg-type]


def _fields(record: object, name: str) -> dict[Any, Any]:
    """Return the attributes of a record, which must be of the dataclass ``name`` of torch."""
    if not isinstance(record, Record) or record.name != name:
        actual = record.name if isinstance(record, Record) else type(record).__name__
        raise _WrongError(f"there is a {actual} where a {name.rpartition('.')[2]} should be")
    return record.state if isinstance(record.state, dict) else {}


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise _WrongError(f"{what} should be a {kind.__name__}, and is a {type(value).__name__}")
    return value


def _size(value: object, what: str) -> tuple[int, ...]:
    """Return the numbers of a ``torch.Size``, which is a record here since no class of torch is called."""
    numbers = value.arguments[0] if isinstance(value, Record) and len(value.arguments) == 1 else None
    if (
        not isinstance(numbers, tuple)
        or not all(type(number) is int and number >= 0 for number in numbers)
        or not is_below(2**63, numbers)
    ):
        raise _WrongError(f"{what} is no list of sizes")
    return numbers
