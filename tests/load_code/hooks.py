"""Load code in hooks that run before a module takes its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm

from tests.load_code.cases import ROWS, WIDTH, Keys, Metadata, State, case, inside, made, with_versions

LINEAR = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}


class Linear(nn.Linear):
    """A layer whose subclasses have load code."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        nn.Module.register_load_state_dict_pre_hook(self, type(self).before)

    @staticmethod
    def before(
        module: Any,
        state: State,
        prefix: str,
        metadata: Metadata,
        strict: bool,
        missing: Keys,
        unexpected: Keys,
        errors: Keys,
    ) -> None:
        raise NotImplementedError

    @staticmethod
    def saved() -> State:
        return made(LINEAR)


@case("torch's weight norm takes the names of the older one")
class WeightNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(weight_norm(nn.Linear(WIDTH, ROWS)), nn.Linear(ROWS, WIDTH))

    @staticmethod
    def saved() -> State:
        old = {"0.weight_g": (ROWS, 1), "0.weight_v": (ROWS, WIDTH), "0.bias": (ROWS,)}
        return made(old | {"1.weight": (WIDTH, ROWS), "1.bias": (WIDTH,)})


@case("torch's spectral norm computes the vector that old files lack")
class SpectralNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(spectral_norm(nn.Linear(WIDTH, ROWS)), nn.Linear(ROWS, WIDTH))

    @staticmethod
    def saved() -> State:
        old = {"0.weight_orig": (ROWS, WIDTH), "0.weight": (ROWS, WIDTH), "0.weight_u": (ROWS,), "0.bias": (ROWS,)}
        return made(old | {"1.weight": (WIDTH, ROWS), "1.bias": (WIDTH,)})


@inside("a public hook renames")
class Renames(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        for new, old in (("weight", "kernel"), ("bias", "offset")):
            if prefix + old in state:
                state[prefix + new] = state.pop(prefix + old)

    @staticmethod
    def saved() -> State:
        return made({"kernel": (WIDTH, WIDTH), "offset": (WIDTH,)})


@inside("a private hook, a bound method, renames")
class RenamesPrivately(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        nn.Module._register_load_state_dict_pre_hook(self, self._rename)

    def _rename(self, state: State, prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}linear.")]:
            state[prefix + key.removeprefix(f"{prefix}linear.")] = state.pop(key)

    @staticmethod
    def saved() -> State:
        return made({f"linear.{name}": shape for name, shape in LINEAR.items()})


def transpose_as_module_says(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    assert isinstance(module, TransposesPrivately)
    if module.transposed:
        state[prefix + "weight"] = state[prefix + "weight"].t().contiguous()


@inside("a private hook that is given the module transposes")
class TransposesPrivately(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.transposed = True
        nn.Module._register_load_state_dict_pre_hook(self, transpose_as_module_says, with_module=True)

    @staticmethod
    def saved() -> State:
        return made(LINEAR)


@inside("a hook drops what old files have too much")
class Drops(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        for name in ("relative_position_index", "attn_mask"):
            state.pop(prefix + name, None)

    @staticmethod
    def saved() -> State:
        return made(LINEAR) | {"relative_position_index": torch.arange(9).view(3, 3), "attn_mask": torch.ones(2, 2)}


@inside("a hook adds what old files lack")
class Adds(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        if prefix + "bias" not in state:
            state[prefix + "bias"] = torch.full((WIDTH,), 0.125)

    @staticmethod
    def saved() -> State:
        return made({"weight": (WIDTH, WIDTH)})


@inside("a hook fills in what the module has by its own init")
class KeepsOwn(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        state.setdefault(prefix + "bias", module.bias)

    @staticmethod
    def saved() -> State:
        return made({"weight": (WIDTH, WIDTH)})


@inside("a hook mixes the file with the module's own init")
class Mixes(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = 0.75 * state[prefix + "weight"] + 0.25 * module.weight.detach()


def in_order(mixed: Tensor, heads: int) -> Tensor:
    """From q, k, v of each head in turn to all of q, all of k, all of v."""
    return mixed.reshape(heads, 3, -1, *mixed.shape[1:]).transpose(0, 1).flatten(0, 2)


@inside("litgpt's attention takes q, k and v of each head in turn")
class Attention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias"):
            legacy = f"{prefix}attn.{name}"
            if legacy in state_dict:
                state_dict[f"{prefix}qkv.{name}"] = in_order(state_dict.pop(legacy), self.heads)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @staticmethod
    def saved() -> State:
        legacy = {"attn.weight": (3 * WIDTH, WIDTH), "attn.bias": (3 * WIDTH,), "proj.weight": (WIDTH, WIDTH)}
        return made(legacy)


@inside("a hook casts: eight bits and a scale make a weight")
class Dequantizes(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        if state[prefix + "weight"].dtype is torch.int8:
            scale = state.pop(prefix + "weight_scale")
            state[prefix + "weight"] = state[prefix + "weight"].to(torch.float32) * scale[:, None]

    @staticmethod
    def saved() -> State:
        whole = torch.arange(WIDTH * WIDTH, dtype=torch.int8).view(WIDTH, WIDTH)
        return made({"weight_scale": (WIDTH,), "bias": (WIDTH,)}) | {"weight": whole}


@inside("a hook splits one key into several")
class Splits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        nn.Module.register_load_state_dict_pre_hook(self, self.before)

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            for part, value in zip("qkv", state.pop(f"{prefix}in_proj_{name}").chunk(3), strict=True):
                state[f"{prefix}{part}.{name}"] = value

    @staticmethod
    def saved() -> State:
        return made({"in_proj_weight": (3 * WIDTH, WIDTH), "in_proj_bias": (3 * WIDTH,)})


@inside("a hook fuses several keys into one")
class Fuses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        nn.Module.register_load_state_dict_pre_hook(self, self.before)

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            parts = [state.pop(f"{prefix}{part}.{name}") for part in "qkv"]
            state[f"{prefix}qkv.{name}"] = torch.cat(parts)

    @staticmethod
    def saved() -> State:
        return made({f"{part}.{name}": shape for part in "qkv" for name, shape in LINEAR.items()})


@inside("a hook changes a tensor of the file in place")
class InPlace(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        state[prefix + "weight"].mul_(2)
        state[prefix + "bias"] -= 1


@inside("a hook looks at values, and divides what is too large")
class LooksAtValues(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        if state[prefix + "weight"].abs().max() > 3:
            state[prefix + "weight"] = state[prefix + "weight"] / 8
        if bool((state[prefix + "bias"] < 0).any()):
            raise AssertionError("no bias of this file is negative")

    @staticmethod
    def saved() -> State:
        state = made(LINEAR)
        return state | {"weight": state["weight"] * 8}


@inside("a hook takes a number out of the file")
class TakesItem(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        module.steps = int(state.pop(prefix + "steps").item())
        state[prefix + "bias"] = state[prefix + "bias"] * module.steps

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    @staticmethod
    def saved() -> State:
        return made(LINEAR) | {"steps": torch.tensor(3)}


@inside("a hook does as the shape in the file says")
class LooksAtShape(Linear):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        weight = state[prefix + "weight"]
        if weight.dim() == 4:  # a convolution of one pixel
            state[prefix + "weight"] = weight.squeeze(-1).squeeze(-1)

    @staticmethod
    def saved() -> State:
        return made(LINEAR | {"weight": (WIDTH, WIDTH, 1, 1)})


@case("a position embedding is resized to the model's grid")
class Positions(nn.Module):
    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, WIDTH))
        self.head = nn.Linear(WIDTH, ROWS)
        nn.Module.register_load_state_dict_pre_hook(self, self.before)

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        old, wanted = state[prefix + "pos_embed"], module.pos_embed
        if old.shape == wanted.shape:
            return
        sides = [int((value.shape[1] - 1) ** 0.5) for value in (old, wanted)]
        grid = old[:, 1:].reshape(1, sides[0], sides[0], -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(sides[1], sides[1]), mode="bicubic", align_corners=False)
        state[prefix + "pos_embed"] = torch.cat((old[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    @staticmethod
    def saved() -> State:
        return made({"pos_embed": (1, 10, WIDTH), "head.weight": (ROWS, WIDTH), "head.bias": (ROWS,)})


@case("a hook of the parent renames the keys of its children")
class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        nn.Module.register_load_state_dict_pre_hook(self, self.before)

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        for key in list(state):
            if key.startswith(f"{prefix}layer"):
                state[f"{prefix}blocks." + key.removeprefix(f"{prefix}layer")] = state.pop(key)

    @staticmethod
    def saved() -> State:
        return made({f"layer{index}.{name}": shape for index in range(2) for name, shape in LINEAR.items()})


@case("modules two deep have code on each level")
class Nested(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((Renames(), Drops()))
        self.stem = nn.Sequential(Dequantizes(), nn.Sequential(Splits()))

    @staticmethod
    def saved() -> State:
        parts = {"layer0.": Renames, "layer1.": Drops, "stem.0.": Dequantizes, "stem.1.0.": Splits}
        return {prefix + key: value for prefix, kind in parts.items() for key, value in kind.saved().items()}  # type: ignore[attr-defined]


@case("keys that the model has no use for are filtered, and a wrapper's prefix is taken off")
class Filters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        nn.Module.register_load_state_dict_pre_hook(self, self.before)

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        for key in list(state):
            value = state.pop(key)
            name = key.removeprefix("module.")
            if not name.startswith(("loss.", "pixel_")) and not name.endswith("anchors"):
                state[name] = value

    @staticmethod
    def saved() -> State:
        keys = {f"module.body.{name}": shape for name, shape in LINEAR.items()}
        return made(keys | {"module.loss.weight": (3,), "pixel_mean": (3, 1, 1), "module.body.anchors": (2,)})


class Shifting(Linear):
    """Reads the version of its module in the file."""

    _version = 2

    @staticmethod
    def before(module: Any, state: State, prefix: str, metadata: Metadata, *_: Any) -> None:
        version = metadata.get("version")
        if version is None or version < 2:
            state[prefix + "bias"] = state[prefix + "bias"] + (10 if version is None else 20)


@inside("a hook reads that a file has no version")
class WithoutVersion(Shifting):
    pass


@case("a hook reads an old version in the file")
class OldVersion(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), Shifting())

    @staticmethod
    def saved() -> State:
        keys = {f"{index}.{name}": shape for index in range(2) for name, shape in LINEAR.items()}
        return with_versions(made(keys), **{"0": 1, "1": 1})


@case("a hook reads today's version in the file, and changes nothing", has_effect=False)
class TodaysVersion(OldVersion):
    @staticmethod
    def saved() -> State:
        return with_versions(dict(OldVersion.saved()), **{"0": 1, "1": 2})


@case("a hook fills in the key of a tied weight")
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.decoder = nn.Linear(WIDTH, ROWS)
        self.decoder.weight = self.embed.weight
        nn.Module.register_load_state_dict_pre_hook(self, self.before)

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        state[prefix + "decoder.weight"] = state[prefix + "embed.weight"]

    @staticmethod
    def saved() -> State:
        return made({"embed.weight": (ROWS, WIDTH), "decoder.bias": (ROWS,)})


@case("of a tied weight with two values, the last that is copied stays")
class TiedTwice(Tied):
    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        state[prefix + "decoder.weight"] = state[prefix + "embed.weight"] + 1
