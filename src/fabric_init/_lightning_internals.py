"""Private names of Lightning that we need, all in this file, and one that FSDP needs beside Lightning's.

``tests/test_torch_internals.py`` says which is gone and which files need it. Other names of torch are in
``_torch_internals`` and ``_dtensor_internals``.

Private attributes of objects are used where the objects are, mostly in classes of ours that inherit them:

- of an FSDP policy ``_run_policy``, of a module that FSDP has wrapped ``_fsdp_wrapped_module``;
- of Fabric ``_strategy``, ``_validate_setup`` and ``_validate_launched``; its ``setup`` takes ``_reapply_compile=…``;
- of Lightning's strategies ``_ddp_kwargs``, ``_fsdp_kwargs`` and ``_parallelize_fn``; of the one for DeepSpeed
  ``_setup_distributed``, ``_set_world_ranks``, ``_init_deepspeed_distributed``, ``_format_config``,
  ``_config_initialized`` and ``_initialize_engine``; of the Trainer's ``_init_config_if_needed``;
- of a ``LightningModule`` ``_trainer`` and ``_fabric``, by which it is known what is no part of it.
"""

from __future__ import annotations

import lightning.fabric.connector
import lightning.fabric.strategies.deepspeed
import lightning.fabric.wrappers
import torch.distributed.fsdp.wrap

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

# -- torch, for FSDP -----------------------------------------------------------------------------------------

# Base class of FSDP's wrapping policies. Checked on torch 2.13.0.
WrapPolicy = torch.distributed.fsdp.wrap._Policy
