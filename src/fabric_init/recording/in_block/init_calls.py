"""Recognize that a function of ``torch.nn.init`` runs, so that it is recorded as one call."""

from __future__ import annotations

from types import CodeType, FrameType

import torch

from fabric_init.recording.tape.call_site import is_torch_file
from fabric_init.recording.tape.op_properties import INIT_FUNCTIONS

_INIT_FILE = torch.nn.init.__file__
_INIT_CODE: dict[str, CodeType] = {name: function.__code__ for name, function in INIT_FUNCTIONS.items()}


def init_call(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the ``torch.nn.init`` function that runs at or above ``frame``, if there is one.

    Most of these functions do not call a ``TorchFunctionMode``, and patching ``torch.nn.init`` would miss captured
    references (``from torch.nn.init import xavier_uniform_``). But however such a function was called, its frame is on
    the stack when its first op arrives.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _INIT_FILE:
            if _INIT_CODE.get(code.co_name) is code:
                return frame
        elif not is_torch_file(code.co_filename):
            return None
        frame = frame.f_back
    return None
