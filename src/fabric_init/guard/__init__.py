"""No tensor is used or saved before it has its value: the guard of recorded and of allocated models.

[Note: module states]

The guard keeps its state on the modules themselves, so that parts of a model stay guarded wherever they are put::

                 materialize, init_module(checkpoint=...), setup with a declared load
        +----------------------------------------------------------------------------+
        |                                                                            v
    RECORDED --------------------------> ALLOCATED ------------------------------> FILLED
    no memory   end of init_module,      memory with      load_state_dict,         values, and
                or setup if it shards    sentinel values  fabric.load, load_raw,   no hooks left
                                                          init_missing, a write

``RECORDED`` (:mod:`~fabric_init.guard.recorded`): the tensors are on the meta device. ``forward`` and ``state_dict``
raise, and so does copying or pickling. These actions of the user survive until values come:

- ``load_state_dict``, with and without ``assign=True``: what it brings is read when memory is allocated;
- putting tensors with memory into the model, which are kept;
- moving, wrapping and renaming modules, and combining models of several blocks (strategies that fill in setup).

In-place writes and casts after the block have nothing to act on: filling the model raises and names the tensors.

``ALLOCATED`` (:mod:`~fabric_init.guard.state`, ``hooks``): the tensors have memory, and the uninitialized ones hold
sentinel values (:mod:`~fabric_init.guard.sentinels`). ``forward``, ``state_dict`` and pickling raise and name those.
Each is tracked until it is written, through:

- ``to``, ``half`` and ``to_empty`` (:mod:`~fabric_init.guard.apply`);
- ``copy.deepcopy``: the copy is guarded by a state of its own;
- taking modules out, replacing them, and putting them into other models;
- new names and new modules for a tensor: ``convert_sync_batchnorm``, ``weight_norm``, ``prune``, parametrizations
  (:mod:`~fabric_init.guard.rehome`);
- a load that brings some tensors only: the model's own init completes it, as in plain PyTorch.

``FILLED``: every tensor under the module has its value. The next use removes the hooks.

A module may be in two states: one that an earlier block has allocated, and that is part of a model recorded later.
"""
