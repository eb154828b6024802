"""Recording: run a model's constructor without values, and keep on a tape how each tensor would get its value.

[Note: what is recorded]
A recorded tensor is a meta tensor whose *storage* carries a number on the tape. Storages are identified, not Python
objects, so views, ``.data``, ``nn.Parameter(t)`` and tied weights all refer to the same recorded memory, and making
one of them records nothing. What the constructor calls ends up as follows:

- **Init functions** of ``torch.nn.init`` are recorded as one call with its arguments, so that reports can name the rule
  and its numbers. The ops inside are not recorded again.
- **Ops** that create a tensor, or read or write a recorded one, run on the meta device for their shapes and are
  recorded with the line of the model's code. Uninitialized memory (``torch.empty``) gets a number, but no op.
- **Constants** are the real tensors that a recorded op reads (NumPy data, a loaded file), copied at that moment, so
  that a later change to the real tensor does not reach the tape.
- **Functions in C++ that are made of ops** are recorded as those, with what they do in place to their results. The few
  that read memory themselves, or go another way for subclasses, are recorded as one op (``in_block/one_op.py``).
- **Compiled functions** run as they are written, and are compiled when they are called after the block.
- **Values** that Python needs (``.item()``, ``.tolist()``, ``nonzero``) are the true ones: the tensor in question, and
  nothing else, is replayed as of that point. Results that are tensors are recorded again.
- **Run for real, at once**: ops on real tensors only, ops that write into a real tensor, and ops whose result is
  sparse, nested or quantized, which the tape cannot describe. Random numbers among these are drawn from the recorded
  position in the stream (see [Note: random streams] in ``tape/random_streams.py``).
- ``device="meta"`` asked for by name passes through unrecorded: such a tensor has no values, and an op that mixes it
  with recorded tensors raises :class:`~fabric_init.errors.RecordingError`.

From the top: ``mode`` (the block, a function mode), ``after_block/`` (what a recorded tensor answers when no block is
open), ``in_block/`` (the recorder and the function mode's handlers), ``tensor/`` (the recorded tensor), ``replay/``
(runs ops), ``tape/`` (data).
"""
