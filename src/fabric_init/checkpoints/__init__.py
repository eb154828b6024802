"""Read checkpoints: the header first, to plan from, then each tensor, or a region of it, once.

:func:`open_checkpoint` turns a path, URL or model id into a :class:`CheckpointReader`. Nothing here runs code from a
file, and a damaged file raises a :class:`~fabric_init.errors.CheckpointError` that names it, whatever bytes it holds.
"""

from __future__ import annotations

from fabric_init.checkpoints.formats.dcp.reader import DCPReader
from fabric_init.checkpoints.formats.deepspeed.reader import DeepSpeedFolderReader
from fabric_init.checkpoints.formats.gguf.reader import GGUFReader
from fabric_init.checkpoints.formats.indexed_files import ShardedReader
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.checkpoints.formats.torch_save.reader import TorchFileReader
from fabric_init.checkpoints.mapping.convert import Conversion, ConversionResult, Fuse, Split, Stack, Transpose, Unstack
from fabric_init.checkpoints.mapping.rename import rename_keys
from fabric_init.checkpoints.mapping.select import Layers, Part
from fabric_init.checkpoints.open import open_checkpoint
from fabric_init.checkpoints.quantized.dequantize import Dequantize
from fabric_init.checkpoints.reader import BaseReader, CheckpointReader, TensorSpec
from fabric_init.checkpoints.region import Box, Region, Span, take
from fabric_init.checkpoints.registry import Candidate, register_reader, unregister_reader
from fabric_init.checkpoints.storage.manifest import write_manifest
from fabric_init.checkpoints.storage.remote import RemotePath

__all__ = [
    "BaseReader",
    "Box",
    "Candidate",
    "CheckpointReader",
    "Conversion",
    "ConversionResult",
    "DCPReader",
    "DeepSpeedFolderReader",
    "Dequantize",
    "Fuse",
    "GGUFReader",
    "Layers",
    "Part",
    "Region",
    "RemotePath",
    "SafetensorsReader",
    "ShardedReader",
    "Span",
    "Split",
    "Stack",
    "TensorSpec",
    "TorchFileReader",
    "Transpose",
    "Unstack",
    "open_checkpoint",
    "register_reader",
    "rename_keys",
    "take",
    "unregister_reader",
    "write_manifest",
]
