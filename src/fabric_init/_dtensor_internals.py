"""Private names of ``torch.distributed.tensor`` that we need, all in this file: a new release may move or drop any.

``tests/test_torch_internals.py`` says which is gone and which files need it. Of a ``DTensor`` we also use the private
attributes ``_local_tensor`` and ``_spec``, where the objects are.
"""

from __future__ import annotations

import torch.distributed.tensor._dtensor_spec
import torch.distributed.tensor._utils
import torch.distributed.tensor.placement_types

# Make a DTensor of a shard that this rank has. Checked on torch 2.13.0.
DTensorSpec = torch.distributed.tensor._dtensor_spec.DTensorSpec
# Shape, strides and dtype of the full tensor, for DTensorSpec. Checked on torch 2.13.0.
TensorMeta = torch.distributed.tensor._dtensor_spec.TensorMeta
# Which part of a tensor a rank holds. Checked on torch 2.13.0.
compute_local_shape_and_global_offset = torch.distributed.tensor._utils._compute_local_shape_and_global_offset
# Placement of FSDP over tensor parallelism. Checked on torch 2.13.0.
StridedShard = torch.distributed.tensor.placement_types._StridedShard
