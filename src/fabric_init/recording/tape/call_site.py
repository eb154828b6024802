"""Find the line of the model's own code that an op goes back to."""

from __future__ import annotations

import os
from functools import cache
from types import FrameType

import torch

from fabric_init.recording.tape.op_properties import INIT_FUNCTIONS
from fabric_init.recording.tape.tape import CallSite

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # recording/
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_MODULES = os.path.join(_TORCH, "nn", "modules", "")
_STDLIB = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
# transformers and timm wrap torch's init functions under the same names and these: report the wrapper's caller
_WRAPPERS = INIT_FUNCTIONS.keys() | {
    "copy_",
    "lecun_normal_",
    "default_flax_embed_init_",
    "trunc_normal_tf_",
    "_trunc_normal_",
    "variance_scaling_",
    "_variance_scaling",
}


@cache
def is_torch_file(file: str) -> bool:
    """Return whether a source file belongs to torch, or to the recording."""
    return file.startswith((_TORCH, _OWN))


@cache
def _is_plumbing(file: str) -> bool:
    # torch itself, and what may stand between a model's line and torch: copy.deepcopy, contextlib, functools
    return is_torch_file(file) or (file.startswith(_STDLIB) and "site-packages" not in file)


def _is_init_wrapper(frame: FrameType) -> bool:
    return frame.f_code.co_name in _WRAPPERS


def caller(frame: FrameType | None) -> CallSite | None:
    """Return the innermost line outside torch at or above ``frame``. Takes about a microsecond."""
    constructed = False
    while frame is not None:
        code = frame.f_code
        if not _is_plumbing(code.co_filename) and not _is_init_wrapper(frame):
            return CallSite(code.co_filename, frame.f_lineno, constructed)
        constructed = constructed or (code.co_name == "__init__" and code.co_filename.startswith(_MODULES))
        frame = frame.f_back
    return None
