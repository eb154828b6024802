"""Which tensors of a model have no values yet, and what a load that ends does for them.

[Note: module states]
A tensor guards itself (see ``recording/tensor/recorded_tensor.py``), so a module has no state of its own. What a model is follows from
its tensors: recorded, as long as one of them is a :class:`~fabric_init.recording.tensor.recorded_tensor.RecordedTensor`; complete, once
none is. Hooks only serve comfort: a load that ends completes the model, and ranks that only together hold a model ask
one another before the first forward, since a rank whose shards have no elements cannot tell.
"""
