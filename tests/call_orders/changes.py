"""Every way in which a user may change a model between building and training it, and what it must hold afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fabric_init import FabricInitError
from tests.call_orders.trainings import orders, train
from tests.support.sweeps import sampled
from tests.support.zoo import inner, weights

VOCABULARY, MORE, WIDTH = 32, 40, 16
TOKENS = torch.arange(8).view(2, 4)
TARGETS = ("q_proj", "v_proj")
RENAME = {r"\.(q_proj|v_proj)\.weight$": r".\1.base_layer.weight", "^": "base_model.model."}
Expected = dict[str, Tensor]
Checks = Callable[[Expected, Expected], list[str]]


def llama(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write(path: Path, seed: int = 77) -> Path:
    torch.manual_seed(seed)
    torch.save(llama().state_dict(), path)
    return path


def adapted(model: nn.Module, kind: str) -> Any:
    how = "pissa" if kind == "pissa" else True
    config = LoraConfig(r=4, target_modules=list(TARGETS), use_dora=kind == "dora", init_lora_weights=how)
    return get_peft_model(model, config)


def _peft_name(key: str) -> str:
    for target in TARGETS:
        key = key.replace(f"{target}.", f"{target}.base_layer.")
    return f"base_model.model.{key}"


# -- ways to build and change ------------------------------------------------------------------------------------------


def declared(fabric: Any, file: Path) -> Any:
    with fabric.init_module(checkpoint=file):
        return llama()


def _in_the_block(fabric: Any, file: Path, kind: str, **options: Any) -> Any:
    with fabric.init_module(checkpoint=file, **options):
        model = adapted(llama(), kind)
    return fabric.setup(model)


def _second_block(fabric: Any, file: Path, kind: str) -> Any:
    model = declared(fabric, file)
    with fabric.init_module(empty_init=True):
        model = adapted(model, kind)
    fabric.init_missing(model)
    return fabric.setup(model)


def _second_block_completed_after_setup(fabric: Any, file: Path, kind: str) -> Any:
    model = declared(fabric, file)
    with fabric.init_module(empty_init=True):
        model = adapted(model, kind)
    model = fabric.setup(model)
    fabric.init_missing(model)
    return model


def _after_the_block(fabric: Any, file: Path, kind: str) -> Any:
    return fabric.setup(adapted(declared(fabric, file), kind))


def _eager_block(fabric: Any, file: Path, kind: str) -> Any:
    model = declared(fabric, file)
    with fabric.init_module():
        model = adapted(model, kind)
    return fabric.setup(model)


def _loaded(fabric: Any, file: Path, kind: str, *, before: bool, **options: Any) -> Any:
    with fabric.init_module(empty_init=True):
        model = adapted(llama(), kind)
    state = {_peft_name(key): value for key, value in torch.load(file).items()}
    if before:
        model.load_state_dict(state, strict=False, **options)
        return fabric.setup(model)
    model = fabric.setup(model)
    model.load_state_dict(state, strict=False, **options)
    return model


ADAPTERS: dict[str, Callable[[Any, Path, str], Any]] = {
    "in the block, no rename": _in_the_block,
    "in the block, strict": lambda *a: _in_the_block(*a, rename=RENAME),
    "in the block, not strict": lambda *a: _in_the_block(*a, rename=RENAME, strict=False),
    "in the block, reinit": lambda *a: _in_the_block(*a, rename=RENAME, reinit=["*.lora_*"]),
    "second block": _second_block,
    "second block, completed after setup": _second_block_completed_after_setup,
    "after the block": _after_the_block,
    "eager block": _eager_block,
    "empty, loaded before setup": lambda *a: _loaded(*a, before=True),
    "empty, loaded after setup": lambda *a: _loaded(*a, before=False),
}


def _resized(fabric: Any, file: Path, where: str, **options: Any) -> Any:
    if where == "in the block":
        with fabric.init_module(checkpoint=file):
            model = llama()
            model.resize_token_embeddings(MORE, **options)
        return fabric.setup(model)
    model = declared(fabric, file)
    if where == "second block":
        with fabric.init_module(empty_init=True):
            model.resize_token_embeddings(MORE, **options)
        fabric.init_missing(model)
    else:
        model.resize_token_embeddings(MORE, **options)
    return fabric.setup(model)


def _tied_again(fabric: Any, file: Path) -> Any:
    model = declared(fabric, file)
    model.tie_weights()
    return fabric.setup(model)


def _tied_by_hand(fabric: Any, file: Path) -> Any:
    with fabric.init_module(checkpoint=file):
        model = llama()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied: the file has both
    model.lm_head.weight = model.model.embed_tokens.weight
    return fabric.setup(model)


def _new_head(fabric: Any, file: Path, where: str) -> Any:
    model = declared(fabric, file)
    if where == "second block":
        with fabric.init_module(empty_init=True):
            model.lm_head = nn.Linear(WIDTH, 5)
        fabric.init_missing(model)
    else:
        model.lm_head = nn.Linear(WIDTH, 5)
    return fabric.setup(model)


class OwnLora(nn.Module):
    """A layer that takes the place of a linear one and keeps its weight under the old name, as litgpt's does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(2, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, 2))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T + hidden @ self.lora_A.T @ self.lora_B.T


def _own_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.q_proj = OwnLora(layer.self_attn.q_proj)
    return model


def _own(fabric: Any, file: Path, where: str) -> Any:
    model = declared(fabric, file)
    if where == "second block":
        with fabric.init_module(empty_init=True):
            _own_layers(model)
        fabric.init_missing(model)
    else:
        _own_layers(model)
    return fabric.setup(model)


def _own_in_the_block(fabric: Any, file: Path) -> Any:
    with fabric.init_module(checkpoint=file, reinit=["*.lora_*"]):
        model = _own_layers(llama())
    return fabric.setup(model)


class Both(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, tokens: Tensor) -> Any:
        return self.first(tokens).logits + self.second(tokens).logits


def _two_in_one(fabric: Any, file: Path) -> Any:
    return fabric.setup(Both(declared(fabric, file), declared(fabric, write_other(file))))


def _written_in_second_block(fabric: Any, file: Path) -> Any:
    model = declared(fabric, file)
    with fabric.init_module(empty_init=True), torch.no_grad():
        model.lm_head.weight.mul_(2)
    return fabric.setup(model)


def write_other(file: Path) -> Path:
    return file.with_name("other.pt")


def _trained(fabric: Any, file: Path, order: tuple[str, ...]) -> Any:
    if {"load", "assign"}.isdisjoint(order):
        model = declared(fabric, file)
    else:
        with fabric.init_module(empty_init=True):
            model = llama()
    return train(model, order, torch.load(file), TOKENS, fabric)


def _acted(fabric: Any, file: Path, act: Callable[[Any], Any]) -> Any:
    return fabric.setup(act(declared(fabric, file)))


ACTS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda model: (model.state_dict(), model)[1],
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to meta": lambda model: model.to("meta"),
    "to cpu": lambda model: model.to("cpu"),
    "cpu": lambda model: model.cpu(),
    "half": lambda model: model.half(),
    "share_memory": lambda model: model.share_memory(),
    "compile": lambda model: torch.compile(model, backend="eager"),
    "ema": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "requires_grad_": lambda model: model.requires_grad_(False).requires_grad_(True),
    "train": lambda model: model.eval().train(),
}


# -- what it must hold -------------------------------------------------------------------------------------------------


def _base(found: Expected, state: Expected, name: Callable[[str], str], leave: tuple[str, ...] = ()) -> list[str]:
    wrong = []
    for key, value in state.items():
        if key not in leave and not torch.equal(found[name(key)], value.to(found[name(key)].dtype)):
            wrong.append(key)
    return wrong


def check_adapters(found: Expected, state: Expected) -> list[str]:
    """The base is the checkpoint's to the bit; the rest is what peft's rules give for it."""
    wrong = _base(found, state, _peft_name)
    for name, value in found.items():
        if "lora_B" in name and value.any():
            wrong.append(f"{name} is not zero")
        if "lora_A" in name and not 0.5 < value.float().abs().max() * WIDTH**0.5 <= 1.01:  # kaiming_uniform_, a=√5
            wrong.append(f"{name} is not peft's")
        if "magnitude" in name:
            base = found[name.split(".lora_magnitude")[0] + ".base_layer.weight"]
            if not torch.allclose(value.float(), base.float().norm(dim=1), rtol=1e-2 if value.itemsize < 4 else 1e-5):
                wrong.append(f"{name} is not the base's norm")
    return wrong


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def check_pissa(found: Expected, state: Expected) -> list[str]:
    """What peft has taken out of the base weights is in the adapters."""
    wrong = []
    for key, value in state.items():
        name = _peft_name(key)
        layer = name.removesuffix("base_layer.weight")
        whole = found[name]
        if layer != name:
            taken = found[f"{layer}lora_B.default.weight"] @ found[f"{layer}lora_A.default.weight"]
            whole = whole + 2 * taken  # lora_alpha / r
            if taken.norm() < 0.1 * value.norm():
                wrong.append(f"{key}: nothing was taken")
        if not torch.allclose(whole, value, atol=1e-5):
            wrong.append(key)
    return wrong


def check_resized(found: Expected, state: Expected) -> list[str]:
    wrong = _base(found, state, str, EMBEDDINGS)
    for name in EMBEDDINGS:
        rows = found[name]
        if rows.shape[0] != MORE or not torch.equal(rows[:VOCABULARY], state[name]):
            wrong.append(f"{name}: the old rows are gone")
        if not 0 < rows[VOCABULARY:].std() < 0.1:
            wrong.append(f"{name}: the new rows have no init")
    return wrong


def check_new_head(found: Expected, state: Expected) -> list[str]:
    wrong = _base(found, state, str, ("lm_head.weight",))
    head = found["lm_head.weight"]
    return wrong if head.shape == (5, WIDTH) and 0.05 < head.std() < 0.5 else [*wrong, "the head has no init"]


def check_own(found: Expected, state: Expected) -> list[str]:
    wrong = _base(found, state, str)
    for name, value in found.items():
        if "lora_B" in name and value.any():
            wrong.append(f"{name} is not zero")
        if "lora_A" in name and not 0.3 < value.abs().max() * WIDTH**0.5 <= 1.01:
            wrong.append(f"{name} has no init")
    return wrong


def check_same(found: Expected, state: Expected) -> list[str]:
    return _base({name.removeprefix("_orig_mod."): value for name, value in found.items()}, state, str)


@dataclass(frozen=True)
class Cell:
    """One row of the table: how the model is made and set up, and what it must hold then."""

    name: str
    make: Callable[[Any, Path], Any]
    check: Checks
    trained: str = ""  # part of the names of what is trained; all, if empty


def cells() -> Iterator[Cell]:
    for way, make in ADAPTERS.items():
        for kind in ("lora", "dora"):
            yield Cell(f"{kind}, {way}", lambda f, c, m=make, k=kind: m(f, c, k), check_adapters, "lora_")
    for way in ("in the block, reinit", "second block"):
        yield Cell(f"pissa, {way}", lambda f, c, m=ADAPTERS[way]: m(f, c, "pissa"), check_pissa, "lora_")
    for where in ("in the block", "second block", "after"):
        for mean in (False, True):
            name = f"resized {where}, mean={mean}"
            yield Cell(name, lambda f, c, w=where, m=mean: _resized(f, c, w, mean_resizing=m), check_resized)
    for where in ("second block", "after"):
        yield Cell(f"new head {where}", lambda f, c, w=where: _new_head(f, c, w), check_new_head)
        yield Cell(f"own layers {where}", lambda f, c, w=where: _own(f, c, w), check_own)
    yield Cell("own layers in the block", _own_in_the_block, check_own)
    yield Cell("tie_weights", _tied_again, check_same)
    yield Cell("tied by hand", _tied_by_hand, check_same)
    yield Cell("written in second block", _written_in_second_block, _check_doubled)
    yield Cell("two in one", _two_in_one, _check_both)
    for name, act in ACTS.items():
        check = _check_half if name == "half" else check_same
        yield Cell(name, lambda f, c, a=act: _acted(f, c, a), check)


def trainings(only: Callable[[tuple[str, ...]], bool] = lambda order: True) -> Iterator[Cell]:
    expected: Expected = {}

    def check(found: Expected, state: Expected) -> list[str]:
        """As plain PyTorch would have trained it."""
        if not expected:
            expected.update(train(llama(), ("load", "optimizer", "scheduler"), state, TOKENS).state_dict())
        return [name for name, value in expected.items() if not torch.allclose(found[name], value, atol=1e-6)]

    for order in filter(only, orders()):
        yield Cell(" → ".join(order), lambda f, c, o=order: _trained(f, c, o), check)


def _check_half(found: Expected, state: Expected) -> list[str]:
    return check_same(found, {name: value.half() for name, value in state.items()})  # FSDP's precision casts it back


def _check_doubled(found: Expected, state: Expected) -> list[str]:
    return _base(found, state, str, EMBEDDINGS) + [n for n in EMBEDDINGS if not torch.equal(found[n], state[n] * 2)]


def _check_both(found: Expected, state: Expected) -> list[str]:
    torch.manual_seed(78)
    other = llama().state_dict()
    return _base(found, state, "first.{}".format) + _base(found, other, "second.{}".format)


# -- the table ---------------------------------------------------------------------------------------------------------

_TORCHS_OWN = ("Tensor.item() cannot be called on meta tensors", "Error(s) in loading state_dict for")


def run_cell(fabric: Any, cell: Cell, file: Path, steps: int = 0) -> tuple[str, str]:
    """``("right", "")``, ``("refused", its error)``, or ``("WRONG", why)``."""
    state = torch.load(file)
    torch.manual_seed(3)
    try:
        model = cell.make(fabric, file)
        model(TOKENS)
        wrong = cell.check(weights(model), state)
    except FabricInitError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:
        known = any(text in str(error) for text in _TORCHS_OWN)
        return "refused" if known else "WRONG", f"{type(error).__name__}: {error}"
    if wrong:
        return "WRONG", ", ".join(wrong[:4])
    return _train(fabric, model, cell, TOKENS, steps) if steps else ("right", "")


def _train(fabric: Any, model: Any, cell: Cell, tokens: Tensor, steps: int) -> tuple[str, str]:
    parameters = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in inner(model).named_parameters()}
    trained = sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    adam = torch.optim.Adam([parameters[name] for name in trained], lr=0.01, eps=1e-30)  # also tiny gradients move
    optimizer = fabric.setup_optimizers(adam)
    before = weights(model)
    for _ in range(steps):
        logits = model(tokens)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        fabric.backward(logits.float().pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    after = weights(model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    if not trained or any(cell.trained not in name for name in trained) or not changed.issuperset(trained):
        return "WRONG", f"trained: {trained[:3]}…, but changed: {sorted(changed)[:3]}…"
    frozen = {name for name in changed.difference(trained) if cell.trained and cell.trained not in name}
    return ("WRONG", f"frozen, but changed: {sorted(frozen)}") if frozen else ("right", "")


def run_table(fabric: Any, file: Path, steps: int = 3, *, every: int = 1, first: int = 0) -> dict[str, tuple[str, str]]:
    """The outcome of one in ``every`` cells; without ``steps`` trainings only where ``setup`` takes all at once."""
    only = (lambda order: True) if steps else (lambda order: order[-1] == "setup")
    table = sampled([*cells(), *trainings(only)], every, first)
    return {cell.name: run_cell(fabric, cell, file, steps if cell.trained else 0) for cell in table}
