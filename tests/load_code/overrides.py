"""Load code in overrides of ``_load_from_state_dict`` and of ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.load_code.cases import ROWS, WIDTH, Keys, Metadata, State, case, inside, made, with_versions
from tests.load_code.hooks import LINEAR


class Linear(nn.Linear):
    """A layer whose subclasses have load code."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    @staticmethod
    def saved() -> State:
        return made(LINEAR)


@inside("an override scales, then calls super")
class Scales(Linear):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 0.5
        super()._load_from_state_dict(state_dict, prefix, *args)


@inside("an override copies everything by itself")
class Copies(Linear):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "w"].t())
            self.bias.data.copy_(state_dict[prefix + "b"])

    @staticmethod
    def saved() -> State:
        return made({"w": (WIDTH, WIDTH), "b": (WIDTH,)})


@inside("an override copies rows into its own init")
class CopiesRows(Linear):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.weight[: WIDTH // 2] = state_dict[prefix + "weight"]
            self.bias[::2].fill_(0.5)

    @staticmethod
    def saved() -> State:
        return made({"weight": (WIDTH // 2, WIDTH)})


@inside("an override works on what super has copied")
class WorksAfterSuper(Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))


@inside("an override assigns new parameters")
class Assigns(Linear):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *_: Any) -> None:
        self.weight = nn.Parameter(state_dict[prefix + "weight"] * 3)
        self.bias = nn.Parameter(state_dict[prefix + "bias"].clone(), requires_grad=False)


@inside("an override assigns parameters of the file's shape and dtype", on_ranks=False)
class AssignsOthers(Linear):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *_: Any) -> None:
        self.weight = nn.Parameter(state_dict[prefix + "weight"])
        self.bias = nn.Parameter(state_dict[prefix + "bias"])
        self.out_features = self.weight.shape[0]

    @staticmethod
    def saved() -> State:
        return {key: value.bfloat16() for key, value in made({"weight": (8, WIDTH), "bias": (8,)}).items()}


@inside("an override takes away a parameter that the file lacks", on_ranks=False)
class TakesAway(Linear):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        if prefix + "bias" not in state_dict:
            self.register_parameter("bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def saved() -> State:
        return made({"weight": (WIDTH, WIDTH)})


@inside("an override freezes what it loads")
class Freezes(Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.weight.requires_grad_(False)
        self.eval()


class Bank(Linear):
    """Has a buffer that grows, or is not there before a load."""

    bank: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, WIDTH))
        self.register_buffer("scale", None)

    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"bank": (5, WIDTH), "scale": (WIDTH,)})


@inside("an override makes buffers as the file has them")
class NewBuffers(Bank):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        for name in ("bank", "scale"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)


@inside("an override resizes a buffer in place")
class ResizedBuffers(Bank):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        self.bank.resize_(state_dict[prefix + "bank"].shape)
        self.scale = state_dict[prefix + "scale"]
        super()._load_from_state_dict(state_dict, prefix, *args)


@inside("an override forgives what is missing and unexpected")
class Forgives(Linear):
    def _load_from_state_dict(
        self,
        state_dict: State,
        prefix: str,
        local_metadata: Metadata,
        strict: bool,
        missing_keys: Keys,
        unexpected_keys: Keys,
        error_msgs: Keys,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != prefix + "bias"]
        unexpected_keys[:] = [key for key in unexpected_keys if not key.endswith("_ema")]

    @staticmethod
    def saved() -> State:
        return made({"weight": (WIDTH, WIDTH), "weight_ema": (WIDTH, WIDTH)})


class Lora(nn.Module):
    """litgpt's linear layer with adapters: a file from before them has the names of a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.lora_A = nn.Parameter(torch.randn(2, WIDTH))
        self.lora_B = nn.Parameter(torch.zeros(WIDTH, 2))

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@inside("litgpt's LoRA takes a base checkpoint", strict=False)
class LoraFromBase(Lora):
    @staticmethod
    def saved() -> State:
        return made(LINEAR)


@inside("litgpt's LoRA takes base and adapters together")
class LoraFromBoth(Lora):
    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"lora_A": (2, WIDTH), "lora_B": (WIDTH, 2)})


class FrozenBatchNorm(nn.Module):
    """Of buffers alone; detectron2's subtracts eps in the first version, torchvision's drops a count."""

    _version = 3
    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 0.5)):
            self.register_buffer(name, torch.full((WIDTH,), value))

    def _load_from_state_dict(self, state_dict: State, prefix: str, local_metadata: Metadata, *args: Any) -> None:
        version = local_metadata.get("version", None)
        state_dict.pop(prefix + "num_batches_tracked", None)
        if version is None or version < 2:
            if prefix + "running_mean" not in state_dict:
                state_dict[prefix + "running_mean"] = torch.zeros_like(self.running_mean)  # type: ignore[arg-type]
            if prefix + "running_var" not in state_dict:
                state_dict[prefix + "running_var"] = torch.ones_like(self.running_var)  # type: ignore[arg-type]
        if version is not None and version < 3:
            state_dict[prefix + "running_var"] -= self.eps
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @staticmethod
    def saved() -> State:
        return made(dict.fromkeys(("weight", "bias"), (WIDTH,)))


@case("a frozen batch norm of a file without versions gets statistics")
class FrozenOfNoVersion(nn.Module):
    versions: Mapping[str, int] = {}
    statistics: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), FrozenBatchNorm())

    @classmethod
    def saved(cls) -> State:
        keys = {f"stem.0.{name}": shape for name, shape in LINEAR.items()}
        keys |= {f"stem.1.{name}": (WIDTH,) for name in ("weight", "bias", *cls.statistics)}
        state = made(keys)
        if cls.statistics:
            state["stem.1.num_batches_tracked"] = torch.tensor(12)
        return with_versions(state, **cls.versions) if cls.versions else state


@case("a frozen batch norm of version 1 gets statistics, and less eps")
class FrozenOfVersion1(FrozenOfNoVersion):
    versions = {"stem__1": 1}  # noqa: RUF012


@case("a frozen batch norm of version 2 drops the count, and has less eps")
class FrozenOfVersion2(FrozenOfNoVersion):
    versions = {"stem__1": 2}  # noqa: RUF012
    statistics = ("running_mean", "running_var")


NORM = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (WIDTH,))


@inside("torch's batch norm needs no count of an old file")
class OldBatchNorm(nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    @staticmethod
    def saved() -> State:
        return made(NORM)


@inside("torch's batch norm keeps its own count if an old file has none")
class CountedBatchNorm(OldBatchNorm):
    def __init__(self) -> None:
        super().__init__()
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.fill_(7)


@case("torch's batch norm in a file with its first version", strict=True)
class BatchNormOfVersion1(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))

    @staticmethod
    def saved() -> State:
        keys = {f"0.{name}": shape for name, shape in LINEAR.items()}
        return with_versions(made(keys | {f"1.{name}": shape for name, shape in NORM.items()}), **{"1": 1})


class ActNorm(nn.Module):
    """Initialized by its first batch, unless values were loaded; as in flows."""

    initialized: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    @staticmethod
    def saved() -> State:
        return made({"loc": (WIDTH,), "scale": (WIDTH,)})


@inside("an ActNorm sets its flag")
class FlagActNorm(ActNorm):
    def __init__(self) -> None:
        super().__init__()
        self.inited = False

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.inited = True


@inside("an ActNorm sets its buffer, which old files lack")
class BufferActNorm(ActNorm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        self.initialized.fill_(1)
        state_dict.setdefault(prefix + "initialized", self.initialized)
        super()._load_from_state_dict(state_dict, prefix, *args)


@inside("one element goes into a buffer without dimensions")
class OneElement(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("level", torch.tensor(0.0))

    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"level": (1,)}) | {"steps": torch.tensor([5])}


@inside("one element goes into a parameter without dimensions", on_ranks=False)
class OneElementParameter(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(1.0))

    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"level": (1,)})


# -- of the root -------------------------------------------------------------------------------------------------------


@case("a root renames in its own load_state_dict")
class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        renamed = {}
        for key, value in state_dict.items():
            if not key.endswith("_tmp_var"):
                renamed[key.replace("net.", "module_list.")] = value
        return super().load_state_dict(renamed, strict)

    @staticmethod
    def saved() -> State:
        keys = {f"net.{index}.{name}": shape for index in range(2) for name, shape in LINEAR.items()}
        return made(keys | {"net.0._tmp_var": (3,)})


@case("a root computes in its own load_state_dict, then sets a flag")
class RootThatComputes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.gain = 1.0

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        state = dict(state_dict)
        self.gain = float(state.pop("gain"))
        state["body.weight"] = state["body.weight"] * self.gain
        result = super().load_state_dict(state, *args, **kwargs)
        with torch.no_grad():
            self.body.bias.clamp_(max=0.5)
        return result

    @staticmethod
    def saved() -> State:
        return made({"body.weight": (WIDTH, WIDTH), "body.bias": (WIDTH,), "gain": ()})


@case("a root reads the versions of its modules")
class RootThatReadsVersions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, ROWS)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        versions = getattr(state_dict, "_metadata", {})
        if versions.get("body", {}).get("version") == 1:
            state_dict = {key: value.flip(0) for key, value in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @staticmethod
    def saved() -> State:
        return with_versions(made({"body.weight": (ROWS, WIDTH), "body.bias": (ROWS,)}), body=1)
