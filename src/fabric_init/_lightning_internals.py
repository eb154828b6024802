"""Private names of Lightning, and of torch for sharded models, that we need, all in this file.

``tests/test_torch_internals.py`` says which is gone and which files need it. Other names of torch are in
``_torch_internals``.

Private attributes of objects are used where the objects are, mostly in classes of ours that inherit them:

- of a ``DTensor`` ``_local_tensor`` and ``_spec``, of an FSDP policy ``_run_policy``, of a module that FSDP has wrapped
  ``_fsdp_wrapped_module``;
- of Fabric ``_strategy``, ``_validate_setup`` and ``_validate_launched``; its ``setup`` takes ``_reapply_compile=…``;
- of Lightning's strategies ``_ddp_kwargs``, ``_fsdp_kwargs`` and ``_parallelize_fn``; of the one for DeepSpeed
  ``_setup_distributed``, ``_set_world_ranks``, ``_init_deepspeed_distributed``, ``_format_config``,
  ``_config_initialized`` and ``_initialize_engine``.
"""

from __future__ import annotations

import lightning.fabric.connector
import lightning.fabric.strategies.deepspeed
import lightning.fabric.wrappers
import torch.distributed.fsdp.wrap
import torch.distributed.tensor._dtensor_spec
import torch.distributed.tensor._utils
import torch.distributed.tensor.placement_types

# -- Lightning ---------------------------------------------------------------------------------------------------------

# Wrapper of a model that was set up. Checked on lightning 2.6.6.
FabricModule = lightning.fabric.wrappers._FabricModule
# Wrapper of an optimizer that was set up. Checked on lightning 2.6.6.
FabricOptimizer = lightning.fabric.wrappers._FabricOptimizer
# Type of Fabric's argument plugins. Checked on lightning 2.6.6.
PluginInput = lightning.fabric.connector._PLUGIN_INPUT
# Type of Fabric's argument precision. Checked on lightning 2.6.6.
PrecisionInput = lightning.fabric.connector._PRECISION_INPUT
# Find the engine in a state to save or load, as Lightning does. Checked on lightning 2.6.6.
get_deepspeed_engines_from_state = lightning.fabric.strategies.deepspeed._get_deepspeed_engines_from_state

# -- torch, for sharded models -----------------------------------------------------------------------------------------

# Base class of FSDP's wrapping policies. Checked on torch 2.13.0.
WrapPolicy = torch.distributed.fsdp.wrap._Policy
# Make a DTensor of a shard that this rank has. Checked on torch 2.13.0.
DTensorSpec = torch.distributed.tensor._dtensor_spec.DTensorSpec
# Shape, strides and dtype of the full tensor, for DTensorSpec. Checked on torch 2.13.0.
TensorMeta = torch.distributed.tensor._dtensor_spec.TensorMeta
# Which part of a tensor a rank holds. Checked on torch 2.13.0.
compute_local_shape_and_global_offset = torch.distributed.tensor._utils._compute_local_shape_and_global_offset
# Placement of FSDP over tensor parallelism. Checked on torch 2.13.0.
StridedShard = torch.distributed.tensor.placement_types._StridedShard
