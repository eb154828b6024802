"""Sharded safetensors files that have their headers alone: the data is a hole, so that no disk is taken."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

_BYTES = 2  # of bf16


def write_hollow(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, a_file: int) -> None:
    """Make a checkpoint in bf16 of these keys and shapes, ``a_file`` of them in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = math.ceil(len(shapes) / a_file)
    keys = iter(shapes)
    weight_map: dict[str, str] = {}
    for number in range(1, files + 1):
        name = f"model-{number:05}-of-{files:05}.safetensors"
        header, end = {}, 0
        for key in islice(keys, a_file):
            start, end = end, end + math.prod(shapes[key]) * _BYTES
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as the library does, so that what is mapped is aligned
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
