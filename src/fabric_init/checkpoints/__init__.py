"""Reading checkpoints: plan from the header, then read each tensor, or a region of it, once.

:func:`open_checkpoint` turns a path, URL or model id into a :class:`CheckpointReader`. Nothing here runs code from a
file, and whatever bytes a file holds, what is wrong with it is a :class:`~fabric_init.errors.CheckpointError` with its
name in it.
"""

from __future__ import annotations

from fabric_init.checkpoints.conversions import Conversion, Fuse, Split, Stack, Transpose, Unstack
from fabric_init.checkpoints.dcp import DCPReader
from fabric_init.checkpoints.deepspeed_folder import DeepSpeedFolderReader
from fabric_init.checkpoints.formats import Candidate, register_reader, unregister_reader
from fabric_init.checkpoints.likely_renames import Suggestion, likely_renames
from fabric_init.checkpoints.manifest import write_manifest
from fabric_init.checkpoints.opening import open_checkpoint
from fabric_init.checkpoints.parts import Layers, Part
from fabric_init.checkpoints.reader import CheckpointReader, TensorSpec
from fabric_init.checkpoints.region import Box, Region, Span, take
from fabric_init.checkpoints.remote import RemotePath
from fabric_init.checkpoints.renaming import rename_keys
from fabric_init.checkpoints.safetensors import SafetensorsReader
from fabric_init.checkpoints.sharded import ShardedReader
from fabric_init.checkpoints.source import Source
from fabric_init.checkpoints.torch_file import TorchFileReader

__all__ = [
    "Box",
    "Candidate",
    "CheckpointReader",
    "Conversion",
    "DCPReader",
    "DeepSpeedFolderReader",
    "Fuse",
    "Layers",
    "Part",
    "Region",
    "RemotePath",
    "SafetensorsReader",
    "ShardedReader",
    "Source",
    "Span",
    "Split",
    "Stack",
    "Suggestion",
    "TensorSpec",
    "TorchFileReader",
    "Transpose",
    "Unstack",
    "likely_renames",
    "open_checkpoint",
    "register_reader",
    "rename_keys",
    "take",
    "unregister_reader",
    "write_manifest",
]
