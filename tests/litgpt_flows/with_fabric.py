"""litgpt's command line on the CPU, with Lightning's Fabric or with ours: ``python with_fabric.py COMMAND …``.

The environment says what is different from `litgpt COMMAND …`:

- `FLOW_FABRIC=ours`: ``fabric_init.Fabric`` stands in the place of ``lightning.Fabric``.
- `FLOW_CONSTANTS=1`: random inits write a constant that depends on their arguments. Tensors that Lightning initializes
  after sharding, and ours as recorded, draw from different streams: so the two can be compared all the same.
"""

from __future__ import annotations

import os
from typing import Any

import lightning
import lightning.fabric.strategies
import torch
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

import fabric_init
import fabric_init.strategies

OURS = os.environ["FLOW_FABRIC"] == "ours"


class OnTheCPU(FullyShardedDataParallel):
    """FSDP as on a GPU, which torch runs on the CPU if it is told the device, and no copy to the CPU is asked for."""

    def __init__(self, module: Any, **options: Any) -> None:
        super().__init__(module, **options | {"device_id": torch.device("cpu")})

    @staticmethod
    def state_dict_type(module: Any, state_dict_type: Any, **configs: Any) -> Any:
        for config in configs.values():
            config.offload_to_cpu = False
        return FullyShardedDataParallel.state_dict_type(module, state_dict_type, **configs)


def constant_(tensor: Tensor, *args: float, std: float = 0.02, **options: Any) -> Tensor:
    """Write a constant that tells shapes and deviations apart; works on whole tensors and on shards."""
    with torch.no_grad():
        return tensor.fill_(std * (1 + (7 * tensor.shape[0] + 3 * tensor.shape[-1]) % 11))


def use_fsdp_on_the_cpu() -> None:
    """Let both kinds of Fabric take litgpt's strategy, which Lightning refuses on the CPU by its exact class."""
    OnTheCPU.__name__ = FullyShardedDataParallel.__name__  # which Lightning and litgpt look at
    torch.distributed.fsdp.FullyShardedDataParallel = OnTheCPU  # type: ignore[misc]
    theirs: Any = (fabric_init if OURS else lightning.fabric).strategies.FSDPStrategy
    lightning.fabric.strategies.FSDPStrategy = type("FSDPStrategy", (theirs,), {})  # type: ignore[misc]


def main() -> None:
    torch.set_num_threads(1)
    if OURS:
        lightning.Fabric = lightning.fabric.Fabric = fabric_init.Fabric  # type: ignore[misc]
    use_fsdp_on_the_cpu()
    if "FLOW_CONSTANTS" in os.environ:
        for name in ("normal_", "uniform_", "kaiming_uniform_"):
            setattr(torch.nn.init, name, constant_)
    from litgpt import __main__ as litgpt
    from litgpt.finetune import lora_legacy

    if "FLOW_LEGACY" in os.environ:  # which has no command
        litgpt.PARSER_DATA["finetune_lora"] = lora_legacy.setup
    litgpt.main()


if __name__ == "__main__":
    main()
