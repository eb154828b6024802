"""The recorder of ops that come after their block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fabric_init.recording.after_block.make_values import AfterBlockValues
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tape.random_streams import LateRandomStreams
from fabric_init.recording.tape.tape import Tape


class LateRecorder(Recorder):
    """Writes ops that come after the block to the tape. It is no active mode: ``AfterBlock`` calls it."""

    def __init__(self, tape: Tape, later: AfterBlockValues) -> None:
        super().__init__(tape)
        self.after_block = later
        self.streams = LateRandomStreams(tape)  # type: ignore[assignment]
        self.recognizes_init_calls = False

    def true_value(self, tensor: Tensor) -> Tensor:
        return self.after_block.value(tensor, "be read")

    def _note_look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note nothing: what is seen after the block is there already, and no load will bring other values."""

    def constant_value(self, value: Tensor) -> Any:
        loaded = not self.after_block.gives_memory and self.after_block.status == "loaded"
        return self.after_block.kept.keep(value, by_reference=loaded)
