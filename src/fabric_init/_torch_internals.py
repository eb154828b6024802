"""Private names of torch that we need, all in this file: a new release of torch may move or drop any of them.

``tests/test_torch_internals.py`` says which is gone and which files need it. Those of sharded tensors and of Lightning
are in ``_lightning_internals``, so that recording and planning load neither.

Private attributes of objects are used where the objects are:

- of a tensor ``_version``, ``_backward_hooks``, ``_post_accumulate_grad_hooks`` and ``_neg_view``;
- of a storage or a generator ``_cdata``, its address; ``TypedStorage`` takes ``_internal=True``, keeps its
  ``_untyped_storage``, and calls its ``_getitem``, ``_setitem``, ``_to``, ``_new_wrapped_storage`` and
  ``_pickle_storage_type``, which are overridden as ``_typed_storage`` of a tensor is;
- of a module ``_parameters``, ``_buffers``, ``_modules``, ``_non_persistent_buffers_set``, ``_apply`` and its tables
  ``_forward_pre_hooks``, ``_state_dict_pre_hooks``, ``_load_state_dict_pre_hooks``, ``_load_state_dict_post_hooks``;
- of a compiled module ``_orig_mod``, of a checkpointed one ``_checkpoint_wrapped_module``;
- of an operator ``_schema``.

``checkpoints/formats/pickles/limits.py`` also knows private names that ``torch.save`` writes into files; those stay.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch._ops
import torch._VF
import torch._weights_only_unpickler
import torch.distributed.distributed_c10d
import torch.nn.init
import torch.nn.modules.batchnorm
import torch.nn.modules.conv
import torch.overrides
import torch.serialization
import torch.utils._device
import torch.utils._python_dispatch
import torch.utils._pytree

# -- modes -------------------------------------------------------------------------------------------------------------

# Ask a tensor without calling function modes or subclasses. Checked on torch 2.13.0.
DisableTorchFunction = torch._C.DisableTorchFunction
# Answer for a tensor subclass without asking it again. Checked on torch 2.13.0.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
# Run an operator without calling dispatch modes. Checked on torch 2.13.0.
DisableTorchDispatch = torch._C._DisableTorchDispatch
# See every operator, however it was reached. Checked on torch 2.13.0.
TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
# Leave the transforms of torch.func that are running. Checked on torch 2.13.0.
functorch_stack = torch._C._functorch
# Keep torch.compile out of our code. Checked on torch 2.13.0.
set_code_exec_strategy = torch._C._dynamo.eval_frame.set_code_exec_strategy
# Say so of a function, and of what that calls. Checked on torch 2.13.0.
FrameExecStrategy = torch._C._dynamo.eval_frame._FrameExecStrategy
# Say that it is not compiled. Checked on torch 2.13.0.
FrameAction = torch._C._dynamo.eval_frame._FrameAction


def graph_break() -> None:
    """Let torch.compile cut the code that it reads here. A name of ``torch._dynamo``, which takes long to import."""
    torch._dynamo.graph_break()


# Know torch.jit.trace while it runs. Checked on torch 2.13.0.
get_tracing_state = torch._C._get_tracing_state
# Leave it for a while. Checked on torch 2.13.0.
set_tracing_state: Callable[[Any], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]
# Know torch.export and make_fx while they run. Checked on torch 2.13.0.
get_dispatch_mode = torch._C._get_dispatch_mode
# Name the two modes that they use. Checked on torch 2.13.0.
DispatchModeKey = torch._C._TorchDispatchModeKey
# Find the recording that is open in this thread. Checked on torch 2.13.0.
get_current_function_mode_stack: Callable[[], list[torch.overrides.TorchFunctionMode]] = (
    torch.overrides._get_current_function_mode_stack
)
# Know whether a mode around a recording would hear of an operator, too. Checked on torch 2.13.0.
len_function_mode_stack: Callable[[], int] = torch._C._len_torch_function_stack
# The same for modes inside it that hear of operators. Checked on torch 2.13.0.
len_dispatch_mode_stack: Callable[[], int] = torch._C._len_torch_dispatch_stack
# Find the innermost of these. Checked on torch 2.13.0.
get_dispatch_mode_at: Callable[[int], Any] = torch._C._get_dispatch_stack_at
# What function modes hear when torch.no_grad() begins and ends. Checked on torch 2.13.0.
set_grad_enabled = torch._C._set_grad_enabled
# Its CURRENT_DEVICE is the default device, without the cost of asking for it. Checked on torch 2.13.0.
default_device = torch.utils._device

# -- operators and their arguments -------------------------------------------------------------------------------------

# Tell operators from other functions, and read their schemas. Checked on torch 2.13.0.
OpOverload = torch._ops.OpOverload
# Operators that are made of others, and may copy although their schema says view. Checked on torch 2.13.0.
COMPOSITE_KEY = torch._C.DispatchKey.CompositeImplicitAutograd
# Read the arguments of Tensor.to as torch does. Checked on torch 2.13.0.
parse_to = torch._C._nn._parse_to
# Map the tensors in nested containers. Checked on torch 2.13.0.
tree_map_only = torch.utils._pytree.tree_map_only

# Find the overload of an operator that takes these arguments. Checked on torch 2.13.0.
resolve_packet: Callable[..., str] = torch._C._jit_resolve_packet
# Call a layer of LSTM, as its module does. Checked on torch 2.13.0.
lstm: Callable[..., Any] = torch._VF.lstm

# -- tensors -----------------------------------------------------------------------------------------------------------

# What torch.export and torch.compile ask a tensor before they make a fake one of it. Checked on torch 2.13.0.
asks_if_view = torch.Tensor._is_view
# Let a tensor that others hold become another one. Checked on torch 2.13.0.
swap_tensor_impl = torch._C._swap_tensor_impl
# Whether something beside its Python object holds a tensor, such as a graph of autograd. Checked on torch 2.13.0.
use_count: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]
# Put a tensor on the meta device into a subclass that claims another device. Checked on torch 2.13.0.
make_subclass = torch.Tensor._make_subclass
# Let code in C++ that asks for the memory of a tensor get an error. Checked on torch 2.13.0.
refuse_memory = torch._C._set_throw_on_mutable_data_ptr
# Ask a tensor for its storage past the subclass that it is of. Checked on torch 2.13.0.
TensorBase = torch._C.TensorBase
# Rebuild a conjugated view. Checked on torch 2.13.0.
conj_view = torch._conj
# Rebuild a negated view. Checked on torch 2.13.0.
neg_view = torch._neg_view

# -- modules -----------------------------------------------------------------------------------------------------------

# Its frame draws for trunc_normal_, which asks whether the tensor is on meta. Checked on torch 2.13.0.
no_grad_trunc_normal_ = torch.nn.init._no_grad_trunc_normal_
# Every kind of batch normalization. Checked on torch 2.13.0.
NormBase = torch.nn.modules.batchnorm._NormBase
# Every transposed convolution: its weight has inputs first. Checked on torch 2.13.0.
ConvTransposeNd = torch.nn.modules.conv._ConvTransposeNd

# -- files and ranks ---------------------------------------------------------------------------------------------------

# Load a pickle as weights_only does, with storages of our own. Checked on torch 2.13.0.
WeightsOnlyUnpickler = torch._weights_only_unpickler.Unpickler
# The same as a module, as legacy_load takes it. Checked on torch 2.13.0.
weights_only_unpickler = torch._weights_only_unpickler
# Read torch's oldest format as torch.load does, which programs replace by one that runs code. Checked on torch 2.13.0.
legacy_load: Callable[..., Any] = torch.serialization._legacy_load
# Names that weights_only allows. Checked on torch 2.13.0.
get_allowed_globals: Callable[[], dict[str, Any]] = torch._weights_only_unpickler._get_allowed_globals
# Names that the user allowed with torch.serialization.add_safe_globals. Checked on torch 2.13.0.
get_user_allowed_globals: Callable[[], dict[str, Any]] = torch._weights_only_unpickler._get_user_allowed_globals
# Names that a pickle asks for. Checked on torch 2.13.0.
get_globals_in_pkl = torch._weights_only_unpickler.get_globals_in_pkl
# Reach ranks that do not come to a collective. Checked on torch 2.13.0.
get_default_store = torch.distributed.distributed_c10d._get_default_store


def timeout_of(group: torch.distributed.ProcessGroup) -> timedelta | None:
    """Return how long the collectives of a group wait, as its user has chosen; ``None`` if its backend does not say.

    Checked on torch 2.13.0.
    """
    try:
        timeout = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):  # backends that are not torch's own
        return None
    return timeout if isinstance(timeout, timedelta) else None
