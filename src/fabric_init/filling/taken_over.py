"""Tensors without values that other modules have taken over from those that they were built in."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fabric_init.filling.unfilled import ATTRIBUTE, Unfilled, Waiting, version_in

BUILT = "_fabric_init_built"
"""Where each guarded module keeps the notes of all modules that were built with it."""


def follow(model: nn.Module) -> list[nn.Module]:
    """Let modules that came into ``model`` since it was built (``convert_sync_batchnorm`` puts some there) wait for
    what they hold of its tensors without values: the same tensors, or others in their memory. Gives these modules.
    """
    modules = list(model.modules())
    guarded = {id(notes): notes for module in modules if (notes := vars(module).get(BUILT)) is not None}
    new = [module for module in modules if BUILT not in vars(module) and (module._parameters or module._buffers)]
    if not guarded or not new:
        return []
    places: dict[int, tuple[Waiting, Unfilled]] = {}
    for waiting in (waiting for notes in guarded.values() for waiting in notes):
        for item in waiting.items:
            if item.tensor is not None and not item.tensor.is_meta:
                places[item.placement.held(item.tensor).data_ptr()] = waiting, item
    places.pop(0, None)  # no elements
    found = []
    for module in new:
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or tensor.is_meta or hasattr(tensor, "_local_tensor"):
                continue
            waiting, item = places.get(tensor.data_ptr(), (None, None))
            if waiting is None or item is None or tensor.shape != item.slot.shape:
                continue
            mine = vars(module).setdefault(ATTRIBUTE, Waiting(module, model=waiting.model))
            if all(known.attribute != name for known in mine.items):
                mine.everywhere = waiting.everywhere
                waiting.everywhere.append(mine)
                version = item.version if tensor is item.tensor else version_in(item.placement, tensor)
                mine.items.append(replace(item, attribute=name, tensor=tensor, version=version))
                found.append(module)
    return found
