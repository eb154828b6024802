"""Record a load: checkpoint keys are sources on the tape, and what load code does with them are ops on it.

A model's own load code (``_load_from_state_dict``, load hooks, an own ``load_state_dict``), and transformers' table of
how its architectures lie on disk, run on tensors that have no values yet. What they leave in the model's tensors is
then read, for the region that a rank keeps, through the recorded ops: only what that region needs of the sources.
"""
