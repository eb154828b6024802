"""Real tensors that recorded writes read when the model gets memory."""

from __future__ import annotations

from torch import Tensor

from fabric_init.errors import RecordingError

_WORTH_A_REFERENCE = 1 << 20  # bytes


class KeptValues:
    """The real tensors that ops after the block have read: copies, but for large ones of a whole state dict.

    Those of a state dict that is loaded before ``setup`` are read there, and a copy would be a second model.
    """

    def __init__(self) -> None:
        self._values: list[tuple[Tensor, int]] = []

    def join(self, earlier: KeptValues) -> None:
        """Take over those of an earlier tape."""
        self._values += earlier._values

    def keep(self, value: Tensor, *, by_reference: bool) -> Tensor:
        """Keep the real ``value`` that a recorded write reads; of what is large and not reused, ``by_reference``."""
        if not by_reference or value.nbytes < _WORTH_A_REFERENCE or value.is_inference():
            return value.detach().clone()
        self._values.append((value, value._version))
        return value.detach()

    def check(self) -> None:
        """Raise if what a recorded write reads was changed since.

        Raises:
            RecordingError: it was.
        """
        changed = sum(value._version != version for value, version in self._values)
        if changed:
            raise RecordingError(
                f"{changed} tensors that load_state_dict or copy_ was given were changed before the model got memory, "
                "which is when they are read. Load copies (tensor.clone()), or load once the model has values."
            )
