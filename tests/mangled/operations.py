"""Operations that make of a checkpoint one that a user might bring: named, cut and ordered in another way.

Each changes what is saved, and keeps account of which keys hold which tensors of the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 2
"""As many tensors under an unrelated name count as new ones: their shapes alone say nothing."""


class Piece(NamedTuple):
    """A part of one tensor of the model."""

    name: str
    part: int = 0
    of: int = 1


class Held(NamedTuple):
    """What one key of the checkpoint holds."""

    tensor: Tensor
    pieces: tuple[Piece, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether that is one tensor of the model, no more and no less."""
        return len(self.pieces) == 1 and self.pieces[0].of == 1


@dataclass
class Mangled:
    """A checkpoint, and what a model should get of it."""

    keys: dict[str, Held]
    truth: dict[str, Tensor]
    done: list[str] = field(default_factory=list)
    """The operations, in words."""
    obscure: set[str] = field(default_factory=set)
    """Tensors under a name that has nothing to do with theirs, a few of a kind: these may count as new."""
    turned: set[str] = field(default_factory=set)
    """Tensors whose dimensions are swapped."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Mangled:
        return cls({name: Held(tensor, (Piece(name),)) for name, tensor in state.items()}, dict(state))

    def held(self) -> set[str]:
        """The tensors that the checkpoint has whole."""
        parts: defaultdict[str, set[int]] = defaultdict(set)
        of: dict[str, int] = {}
        for value in self.keys.values():
            for piece in value.pieces:
                parts[piece.name].add(piece.part)
                of[piece.name] = piece.of
        return {name for name, there in parts.items() if len(there) == of[name]}

    def settle(self) -> None:
        """Square tensors with swapped dimensions cannot be told from others, where nothing else shows it."""
        left = {p.name for value in self.keys.values() for p in value.pieces}
        if not any(name in left and len(set(self.truth[name].shape)) > 1 for name in self.turned):
            for name in self.turned & left:
                self.truth[name] = self.truth[name].T.contiguous()
            self.turned.clear()

    def renamed(self, change: Callable[[str], str], what: str, obscure: bool = False) -> bool:
        """Rename keys; ``False`` if nothing changes, or two keys would get one name."""
        new = {key: change(key) for key in self.keys}
        changed = [key for key, name in new.items() if key != name]
        if not changed or len(set(new.values())) < len(new):
            return False
        if obscure and len(changed) <= FEW:
            self.obscure.update(piece.name for key in changed for piece in self.keys[key].pieces)
        self.keys = {new[key]: value for key, value in self.keys.items()}
        self.done.append(what)
        return True


Operation = Callable[[Mangled, Random], bool]

RELATED = (
    ("q_proj", "to_q", "query", "wq", "q"),
    ("k_proj", "to_k", "key", "wk", "k"),
    ("v_proj", "to_v", "value", "wv", "v"),
    ("o_proj", "wo", "out_proj", "to_out"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
    ("gate_proj", "w1", "gate"),
    ("up_proj", "w3", "up"),
    ("down_proj", "w2", "down"),
    ("mlp", "feed_forward", "ffn", "ff"),
    ("self_attn", "attention", "attn", "self_attention"),
    ("layers", "blocks", "h", "layer"),
    ("norm", "ln", "layer_norm"),
    ("norm1", "ln_1", "layernorm1"),
    ("norm2", "ln_2", "layernorm2"),
    ("fc1", "linear1", "dense1"),
    ("fc2", "linear2", "dense2"),
    ("embed_tokens", "tok_embeddings", "wte"),
    ("word_embeddings", "tok_embed", "token_embedding"),
    ("position_embeddings", "pos_embed", "wpe"),
    ("head", "classification_head", "cls_head"),
    ("input_layernorm", "input_norm"),
    ("LayerNorm", "layer_norm", "norm"),
)
NEUTRAL = ("zeta", "tower", "unit", "thing", "aux_part", "m")
JOINED = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj", "qkv", "c_attn", "packed"),
    ("query", "key", "value"): ("query_key_value", "qkv", "in_proj"),
    ("to_q", "to_k", "to_v"): ("to_qkv", "qkv"),
    ("to_k", "to_v"): ("to_kv",),
    ("k_proj", "v_proj"): ("kv_proj",),
    ("gate_proj", "up_proj"): ("gate_up_proj", "w13", "fused"),
}
APART = {
    "qkv": (("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("red", "green", "blue"), ("x", "y", "z")),
    "c_attn": (("q", "k", "v"), ("query", "key", "value"), ("a", "b", "c")),
}


def parts_of(state: Mangled) -> list[str]:
    """Parts of keys that name modules, but for numbers."""
    return sorted({part for key in state.keys for part in key.split(".")[:-1] if not part.isdecimal()})


def _parents(state: Mangled, module: str) -> list[str]:
    """What is before ``module`` in the keys of its tensors."""
    return sorted({key.rpartition(f"{module}.")[0] for key in state.keys if key.split(".")[-2:-1] == [module]})


def _instead(old: str, new: str, start: str = "") -> Callable[[str], str]:
    pattern = re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])")
    return lambda key: start + pattern.sub(new, key[len(start) :], count=1) if key.startswith(start) else key


def _some_start(state: Mangled, part: str, rng: Random) -> str:
    """Half of the times the start of one key that has ``part``, so that only one place changes."""
    if rng.random() < 0.5:
        return ""
    keys = [key for key in state.keys if part in key.split(".")[:-1]]
    parts = rng.choice(keys).split(".")
    return "".join(f"{above}." for above in parts[: parts.index(part)])


def add_prefix(state: Mangled, rng: Random) -> bool:
    prefix = rng.choice(("model.", "module.", "net.", "_orig_mod.", "student.", "state.body."))
    start = rng.choice(("", "", *sorted({key.partition(".")[0] for key in state.keys})))
    return state.renamed(
        lambda key: prefix + key if key.startswith(start) else key, f"{prefix} before {start or 'all'}"
    )


def remove_prefix(state: Mangled, rng: Random) -> bool:
    first = rng.choice(sorted({key.partition(".")[0] for key in state.keys if key.count(".") > 1}))
    return state.renamed(lambda key: key.removeprefix(f"{first}."), f"without {first}.")


def insert_part(state: Mangled, rng: Random) -> bool:
    part, new = rng.choice(parts_of(state)), rng.choice(("base_layer", "_orig_mod", "inner", "module"))
    start = _some_start(state, part, rng)
    return state.renamed(_instead(part, f"{part}.{new}", start), f"{new} after {start}{part}")


def related_name(state: Mangled, rng: Random) -> bool:
    there = set(parts_of(state))
    old = rng.choice([name for family in RELATED for name in family if name in there] or [""])
    new = rng.choice([name for family in RELATED if old in family for name in family if name != old] or [""])
    if not old:
        return False
    start = _some_start(state, old, rng)
    return state.renamed(_instead(old, new, start), f"{start}{old} is {new}", obscure="head" in old + new)


def related_names(state: Mangled, rng: Random) -> bool:
    """Several names of one vocabulary."""
    return any([related_name(state, rng) for _ in range(4)])


def neutral_name(state: Mangled, rng: Random) -> bool:
    old, new = rng.choice(parts_of(state)), rng.choice(NEUTRAL)
    start = _some_start(state, old, rng)
    return state.renamed(_instead(old, new, start), f"{start}{old} is {new}", obscure=True)


def neutral_siblings(state: Mangled, rng: Random) -> bool:
    """Names for q, k and v that do not tell which is which."""
    family = rng.choice([family for family in JOINED if set(family) <= set(parts_of(state))] or [()])
    new = [f"{rng.choice('xs')}{letter}" for letter in rng.sample("abcde", len(family))]
    names = dict(zip(family, new, strict=True))
    return state.renamed(
        lambda key: ".".join(names.get(part, part) for part in key.split(".")), f"{family} are {new}", obscure=True
    )


def change_case(state: Mangled, rng: Random) -> bool:
    old = rng.choice(parts_of(state))
    camel = re.sub(r"_(\w)", lambda match: match[1].upper(), old)
    new = rng.choice((camel, camel[0].upper() + camel[1:], old.upper(), old.lower()))
    start = _some_start(state, old, rng)
    return state.renamed(_instead(old, new, start), f"{start}{old} is {new}")


def _numbered(state: Mangled, rng: Random) -> tuple[str, str]:
    """What is before and after the number of one list: ``layers.`` and nothing, or ``mlp.fc`` and nothing."""
    found = {
        (key[: match.start()], re.match(r"[^.]*", key[match.end() :])[0])  # type: ignore[index]
        for key in state.keys
        for match in re.finditer(r"\d+", key.rpartition(".")[0])
    }
    return rng.choice(sorted(found) or [("", "")])


def shift_numbers(state: Mangled, rng: Random) -> bool:
    before, after = _numbered(state, rng)
    change = rng.choice((lambda n: n + 1, lambda n: n + 1, lambda n: 2 * n, lambda n: n + 7, lambda n: n - 1))
    pattern = re.compile(rf"{re.escape(before)}(\d+)(?={re.escape(after)}\.)")
    if not before and not after:
        return False

    def shifted(key: str) -> str:
        match = pattern.match(key)
        return key if match is None else f"{before}{max(change(int(match[1])), 0)}{key[match.end() :]}"

    if any(new in state.truth and new not in state.keys for new in map(shifted, state.keys)):
        return False  # a name that another operation has left: nobody can see that this is another tensor
    return state.renamed(shifted, f"other numbers for {before}{{}}{after}")


def swap_values(state: Mangled, rng: Random) -> bool:
    """Nobody can see this: each name has the other's values, and that is what it means."""
    key = rng.choice(list(state.keys))
    alike = [k for k, v in state.keys.items() if k != key and v.tensor.shape == state.keys[key].tensor.shape]
    if not alike:
        return False
    other = rng.choice(alike)
    one, two = state.keys[key], state.keys[other]
    if not one.whole or not two.whole or {one.pieces[0].name, two.pieces[0].name} & state.turned:
        return False
    a, b = one.pieces[0].name, two.pieces[0].name
    state.keys[key], state.keys[other] = Held(two.tensor, one.pieces), Held(one.tensor, two.pieces)
    state.truth[a], state.truth[b] = state.truth[b], state.truth[a]
    state.done.append(f"{key} and {other} swapped")
    return True


def swap_parts(state: Mangled, rng: Random) -> bool:
    """``a.b`` becomes ``b.a``."""
    key = rng.choice(list(state.keys)).split(".")
    if len(key) < 3:
        return False
    at = rng.randrange(len(key) - 2)
    one, two = key[at : at + 2]
    pattern = re.compile(rf"(?<![^.]){re.escape(one)}\.{re.escape(two)}(?=\.)")
    return state.renamed(lambda name: pattern.sub(f"{two}.{one}", name), f"{one}.{two} is {two}.{one}")


def gamma_and_beta(state: Mangled, rng: Random) -> bool:
    norms = {key.rpartition(".")[0] for key, v in state.keys.items() if key.endswith(".weight") and v.tensor.dim() == 1}
    leaves = {"weight": "gamma", "bias": "beta"}

    def change(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        return f"{module}.{leaves.get(leaf, leaf)}" if module in norms else key

    return state.renamed(change, "gamma and beta")


def join(state: Mangled, rng: Random) -> bool:
    family = rng.choice([family for family in JOINED if set(family) <= set(parts_of(state))] or [()])
    if not family:
        return False
    new = rng.choice(JOINED[family])
    done = False
    for parent in _parents(state, family[0]):
        for leaf in ("weight", "bias"):
            keys = [f"{parent}{module}.{leaf}" for module in family]
            if not all(key in state.keys for key in keys) or f"{parent}{new}.{leaf}" in state.keys:
                continue
            values = [state.keys.pop(key) for key in keys]
            pieces = tuple(piece for value in values for piece in value.pieces)
            try:
                tensor = torch.cat([value.tensor for value in values])
            except RuntimeError:  # dimensions are swapped
                state.keys |= dict(zip(keys, values, strict=True))
                continue
            state.keys[f"{parent}{new}.{leaf}"] = Held(tensor, pieces)
            done = True
    state.done += [f"{family} joined as {new}"] * done
    return done


def split(state: Mangled, rng: Random) -> bool:
    joined = rng.choice([name for name in APART if name in parts_of(state)] or [""])
    if not joined:
        return False
    into = rng.choice(APART[joined])
    done = False
    for key in [key for key in state.keys if key.split(".")[-2:-1] == [joined]]:
        value = state.keys[key]
        dim = value.tensor.dim() - 1 if joined == "c_attn" else 0
        if not value.whole or value.tensor.shape[dim] % 3 or value.pieces[0].name in state.turned:
            continue
        name = value.pieces[0]
        del state.keys[key]
        for part, tensor in enumerate(value.tensor.chunk(3, dim)):
            new = f"{key.rpartition(f'{joined}.')[0]}{into[part]}.{key.rpartition('.')[2]}"
            state.keys[new] = Held(tensor.contiguous(), (Piece(name.name, part, 3),))
        done = True
    state.done += [f"{joined} apart as {into}"] * done
    return done


def stack(state: Mangled, rng: Random) -> bool:
    """The experts of a layer in one tensor of each kind."""
    joined = rng.random() < 0.5
    lists: defaultdict[str, defaultdict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in state.keys:
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.+)\.weight", key)
        if match is not None:
            lists[match[1]][match[3]][int(match[2])] = key
    done = False
    for container, kinds in lists.items():
        fuse = joined and {"gate_proj", "up_proj"} <= kinds.keys()
        for kind, numbered in kinds.items():
            if sorted(numbered) != list(range(len(numbered))) or (fuse and kind == "up_proj"):
                continue
            keys = [numbered[number] for number in sorted(numbered)]
            more = (
                [kinds["up_proj"].get(number, "") for number in sorted(numbered)]
                if fuse and kind == "gate_proj"
                else []
            )
            if not all(key in state.keys for key in (*keys, *more)):
                continue
            values = [state.keys.pop(key) for key in keys]
            others = [state.keys.pop(key) for key in more]
            tensor = torch.stack([value.tensor for value in values])
            if others:
                tensor = torch.cat([tensor, torch.stack([value.tensor for value in others])], 1)
            name = "gate_up_proj" if others else kind
            pieces = tuple(piece for value in (*values, *others) for piece in value.pieces)
            state.keys[f"{container}.{name}"] = Held(tensor, pieces)
            done = True
    state.done += ["experts stacked" + ", gate and up joined" * joined] * done
    return done


def unstack(state: Mangled, rng: Random) -> bool:
    """The experts of a layer apart."""
    names = rng.choice((("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("a", "b", "c")))
    leaf = rng.choice((".weight", ""))
    done = False
    for key in [key for key in state.keys if key.endswith((".gate_up_proj", ".down_proj")) and ".experts." in key]:
        value = state.keys[key]
        if not value.whole or value.tensor.dim() != 3:
            continue
        del state.keys[key]
        container, _, own = key.rpartition(".")
        kinds = names[:2] if own == "gate_up_proj" else names[2:]
        of = len(kinds) * len(value.tensor)
        for number, expert in enumerate(value.tensor):
            for index, part in enumerate(expert.chunk(len(kinds))):
                piece = Piece(value.pieces[0].name, index * len(value.tensor) + number, of)
                state.keys[f"{container}.{number}.{kinds[index]}{leaf}"] = Held(part.contiguous(), (piece,))
        done = True
    state.done += [f"experts apart as {names}{leaf}"] * done
    return done


def transpose(state: Mangled, rng: Random) -> bool:
    """One kind of weight, or all; among them one that is not square, or nobody could see it."""
    flat = {
        key: v
        for key, v in state.keys.items()
        if v.tensor.dim() == 2 and v.whole and "emb" not in key and "wte" not in key
    }
    tails = sorted({".".join(key.split(".")[-2:]) for key, v in flat.items() if len(set(v.tensor.shape)) > 1})
    if not tails or state.turned:
        return False
    chosen = rng.sample(tails, 1) if rng.random() < 0.6 else [".".join(key.split(".")[-2:]) for key in flat]
    for key, value in flat.items():
        if ".".join(key.split(".")[-2:]) in chosen:
            state.keys[key] = Held(value.tensor.T.contiguous(), value.pieces)
            state.turned.add(value.pieces[0].name)
    state.done.append(f"{sorted(set(chosen))} transposed")
    return True


def drop(state: Mangled, rng: Random) -> bool:
    """A few keys."""
    for key in rng.sample(list(state.keys), min(rng.randint(1, 3), len(state.keys) - 1)):
        del state.keys[key]
        state.done.append(f"no {key}")
    return True


def drop_module(state: Mangled, rng: Random) -> bool:
    """All of one module, such as a layer."""
    parts = rng.choice(list(state.keys)).split(".")
    if len(parts) < 2:
        return False
    module = ".".join(parts[: rng.randint(1, len(parts) - 1)])
    left = {key: value for key, value in state.keys.items() if not key.startswith(f"{module}.")}
    if len(left) < 4:
        return False
    state.keys = left
    state.done.append(f"no {module}")
    return True


def drop_everywhere(state: Mangled, rng: Random) -> bool:
    """One kind of tensor, in every layer."""
    tail = ".".join(rng.choice(list(state.keys)).split(".")[-2:])
    left = {key: value for key, value in state.keys.items() if not key.endswith(f".{tail}")}
    if len(left) < 4 or len(left) == len(state.keys):
        return False
    state.keys = left
    state.done.append(f"no {tail}")
    return True


def _fresh(tensor: Tensor, rng: Random) -> Held:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    return Held(noise.to(tensor.dtype))


def extra(state: Mangled, rng: Random) -> bool:
    """Keys that are of no tensor, some of them of a shape that one has."""
    for _ in range(rng.randint(1, 2)):
        near = rng.choice(list(state.keys))
        name = rng.choice(("span_logits", "aux_head", "rotary_emb", "ema", "probe", "vocab_projector"))
        place = rng.choice(("", near.rpartition(".")[0].rpartition(".")[0] + "."))
        new = f"{place.lstrip('.')}{name}.{rng.choice(('weight', 'bias', 'inv_freq', 'scale'))}"
        if new not in state.keys and new not in state.truth:
            state.keys[new] = _fresh(state.keys[rng.choice([near, rng.choice(list(state.keys))])].tensor, rng)
            state.done.append(f"also {new}")
    return True


def extra_layer(state: Mangled, rng: Random) -> bool:
    """One more layer at the end of a list."""
    lists = sorted({match[1] for key in state.keys if (match := re.match(r"(.*?)\.\d+\.", key)) is not None})
    if not lists:
        return False
    place = rng.choice(lists)
    numbers = [int(match[1]) for key in state.keys if (match := re.match(rf"{re.escape(place)}\.(\d+)\.", key))]
    last, new = f"{place}.{max(numbers)}.", f"{place}.{max(numbers) + 1}."
    for key in [key for key in state.keys if key.startswith(last)]:
        name = new + key.removeprefix(last)
        if name in state.truth:
            return False
        state.keys[name] = _fresh(state.keys[key].tensor, rng)
    state.done.append(f"also {new}")
    return True


def second_copy(state: Mangled, rng: Random) -> bool:
    """Other values of the same names, under a prefix."""
    prefix = rng.choice(("ema.", "teacher.", "target."))
    if any(key.startswith(prefix) for key in state.keys):
        return False
    state.keys |= {prefix + key: _fresh(value.tensor, rng) for key, value in list(state.keys.items())}
    state.done.append(f"also {prefix}, a second copy")
    return True


def permute(state: Mangled, rng: Random) -> bool:
    keys = list(state.keys)
    rng.shuffle(keys)
    state.keys = {key: state.keys[key] for key in keys}
    state.done.append("other order")
    return True


def change_dtype(state: Mangled, rng: Random) -> bool:
    """A cast that the load takes back."""
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float64))
    for key, value in state.keys.items():
        if value.tensor.is_floating_point():
            state.keys[key] = Held(value.tensor.to(dtype), value.pieces)
    for name, tensor in state.truth.items():
        if tensor.is_floating_point():
            state.truth[name] = tensor.to(dtype).to(tensor.dtype)
    state.done.append(str(dtype))
    return True


OPERATIONS: tuple[Operation, ...] = (
    add_prefix,
    remove_prefix,
    insert_part,
    related_name,
    related_names,
    neutral_name,
    neutral_siblings,
    change_case,
    shift_numbers,
    swap_values,
    swap_parts,
    gamma_and_beta,
    join,
    split,
    stack,
    unstack,
    transpose,
    drop,
    drop_module,
    drop_everywhere,
    extra,
    extra_layer,
    second_copy,
    permute,
    change_dtype,
)


def mangle(state: Mapping[str, Tensor], rng: Random) -> Mangled:
    """A checkpoint after one to four operations."""
    mangled = Mangled.of(state)
    wanted = rng.choice((1, 1, 2, 2, 3, 4))
    for _ in range(20):
        if wanted and rng.choice(OPERATIONS)(mangled, rng):
            wanted -= 1
    mangled.settle()
    return mangled
