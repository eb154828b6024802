"""Which tensors of a model have no values yet, and what a load that ends does for them.

[Note: module states]
A tensor guards itself (see ``recording/tensor/recorded_tensor.py``), so a module has no state of its own. A model is
recorded as long as one of its tensors is a :class:`~fabric_init.recording.tensor.recorded_tensor.RecordedTensor`, and
complete once none is. Hooks do two things only: when a load ends, they complete the model, and before the first forward
they let ranks that hold a model together ask one another, because a rank whose shards have no elements cannot tell.
"""
