"""Layers of bitsandbytes, on the CPU, which quantizes there too: what plain PyTorch makes of the same weights."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from lightning.fabric.plugins import BitsandbytesPrecision
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fabric_init import (
    CheckpointMismatchError,
    Fabric,
    FabricInitError,
    UninitializedTensorError,
    deferred_init,
    init_report,
    materialize,
)
from tests.support.ranks import run_ranks

WIDTH, TOKENS = 64, 32
KINDS = ["nf4", "nf4, double", "fp4, double", "int8"]


def layer(kind: str, inputs: int, outputs: int, bias: bool, storage: torch.dtype) -> nn.Module:
    if kind == "float":
        return nn.Linear(inputs, outputs, bias)
    if kind == "int8":
        return bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False)
    name, _, double = kind.partition(", ")
    return bitsandbytes.nn.Linear4bit(
        inputs,
        outputs,
        bias,
        compute_dtype=torch.float32,
        quant_type=name,
        compress_statistics=bool(double),
        quant_storage=storage,
    )


class Model(nn.Module):
    """Two layers that may be quantized, between two that are not."""

    def __init__(self, kind: str, storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.up = layer(kind, WIDTH, 2 * WIDTH, True, storage)
        self.down = layer(kind, 2 * WIDTH, WIDTH, False, storage)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.is_loaded_in_4bit = kind != "int8"  # what peft asks, and transformers says

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.down(torch.relu(self.up(self.embedding(tokens)))))
        return hidden


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = Model("float").state_dict()
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(state, path)
    return path


def plain(kind: str, state: dict[str, Tensor], storage: torch.dtype = torch.uint8) -> Model:
    """Return what plain PyTorch makes: built, loaded, and moved to the device, which quantizes."""
    torch.manual_seed(5)
    model = Model(kind, storage)
    model.load_state_dict(state, strict=False)
    return model.to("cpu")


def recorded(kind: str, storage: torch.dtype = torch.uint8, *, moved: bool = False) -> Model:
    torch.manual_seed(5)
    with deferred_init(rng="eager"):
        model = Model(kind, storage)
        return model.to("cpu") if moved else model


def parts(parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield all that makes up a parameter, as bytes: float storage holds no numbers."""
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    yield "", value.detach().contiguous().view(torch.uint8)
    for name in ("SCB", "CB"):
        if getattr(parameter, name, None) is not None:
            yield name, getattr(parameter, name)
    state = getattr(parameter, "quant_state", None)
    for name, tensor in state.as_dict(packed=True).items() if state is not None else ():
        yield name, tensor


def everything(model: nn.Module) -> dict[str, Tensor]:
    found = {f"{name} {part}": t for name, p in model.named_parameters() for part, t in parts(p)}
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        for part, tensor in state.as_dict(packed=True).items() if state is not None else ():
            found[f"{name} {part}"] = tensor  # a shard has lost it, its module has it still
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert [name for name, tensor in found.items() if type(tensor) is not Tensor] == []


def assert_as_plain(model: Model, other: Model) -> None:
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (type(one), one.dtype, one.shape, one.requires_grad) == (
            type(two),
            two.dtype,
            two.shape,
            two.requires_grad,
        ), name
    assert_same(everything(model), everything(other))
    tokens = torch.arange(4)
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("moved", [False, True], ids=["filled", "moved in the block"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_float_checkpoint_is_quantized(kind: str, moved: bool, file: Path) -> None:
    model = recorded(kind, moved=moved)
    weight = model.up.weight
    report = materialize(model, checkpoint=file)
    assert model.up.weight is weight
    assert_as_plain(model, plain(kind, load_file(file)))
    row = next(row for row in report.rows if row.name == "up.weight")
    assert row.status == "loaded"
    assert row.origin.startswith("up.weight, ")


@pytest.mark.parametrize("moved", [False, True], ids=["filled", "moved in the block"])
@pytest.mark.parametrize("kind", ["nf4, double", "int8"])
def test_a_model_from_scratch_is_quantized(kind: str, moved: bool) -> None:
    model = recorded(kind, moved=moved)
    materialize(model)
    assert_as_plain(model, plain(kind, {}))


@pytest.mark.parametrize("kind", ["nf4, double", "int8"])
def test_what_the_checkpoint_lacks_is_quantized_from_its_own_init(kind: str, file: Path, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in load_file(file).items() if name not in ("up.weight", "head.weight")}
    save_file(state, tmp_path / "part.safetensors")
    model = recorded(kind)
    with pytest.raises(CheckpointMismatchError, match=r"up\.weight"):
        materialize(model, checkpoint=tmp_path / "part.safetensors")
    assert model.up.weight.shape == (2 * WIDTH, WIDTH), "as it was"
    materialize(model, checkpoint=tmp_path / "part.safetensors", strict=False)
    assert_as_plain(model, plain(kind, state))


@pytest.mark.parametrize("moved", [False, True], ids=["filled", "moved in the block"])
@pytest.mark.parametrize(
    ("kind", "storage"),
    [("nf4", torch.uint8), ("nf4, double", torch.float32), ("fp4, double", torch.bfloat16), ("int8", torch.uint8)],
)
def test_what_was_saved_quantized_is_loaded(
    kind: str, storage: torch.dtype, moved: bool, file: Path, tmp_path: Path
) -> None:
    wanted = plain(kind, load_file(file), storage)
    save_file(wanted.state_dict(), tmp_path / "packed.safetensors")
    model = recorded(kind, storage, moved=moved)
    report = materialize(model, checkpoint=tmp_path / "packed.safetensors")
    assert_as_plain(model, wanted)
    assert {row.status for row in report.rows} == {"loaded"}


def scales(model: Model) -> list[Tensor]:
    weight: Any = model.up.weight
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        return [weight.SCB]
    state = weight.quant_state
    return [state.absmax, state.offset, state.state2.absmax] if state.nested else [state.absmax]


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_weights_that_wait_wait_too(kind: str, file: Path) -> None:
    model = recorded(kind, moved=True)
    for scale in scales(model):
        with pytest.raises(UninitializedTensorError, match=r"up\.weight"):
            scale.tolist()
        with pytest.raises(UninitializedTensorError, match=r"up\.weight"):
            (scale + 1).sum().item()
        with pytest.raises(UninitializedTensorError, match=r"up\.weight"):
            torch.save(scale, io.BytesIO())
    materialize(model, checkpoint=file)
    for found, wanted in zip(scales(model), scales(plain(kind, load_file(file))), strict=True):
        assert torch.equal(found, wanted)


class WithCopies(nn.Module):
    """Has deep copies of a quantized model: made before its device is chosen, and after."""

    def __init__(self, kind: str, *, moves: bool) -> None:
        super().__init__()
        self.model = Model(kind)
        self.before = copy.deepcopy(self.model)
        if moves:
            self.model.to("cpu")
        self.after = copy.deepcopy(self.model)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_deep_copies_are_quantized_as_in_plain_pytorch(kind: str, moves: bool) -> None:
    torch.manual_seed(5)
    with deferred_init(rng="eager"):
        model = WithCopies(kind, moves=moves)
    materialize(model)
    torch.manual_seed(5)
    plain_model = WithCopies(kind, moves=moves)
    for name in ("model", "before", "after"):
        ours, theirs = getattr(model, name), getattr(plain_model, name).to("cpu")
        assert type(ours.up.weight) is type(theirs.up.weight)
        for (key, one), (_, two) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            found, wanted = dict(parts(one)), dict(parts(two))
            assert found.keys() == wanted.keys()
            assert [part for part in found if not torch.equal(found[part], wanted[part])] == [], key
        assert torch.equal(ours(torch.arange(4)), theirs(torch.arange(4)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_loaded_as_what_it_was_copied_from(kind: str, file: Path, tmp_path: Path) -> None:
    state = load_file(file)
    path = tmp_path / "two.safetensors"
    save_file({f"{name}.{key}": t.clone() for name in ("model", "after") for key, t in state.items()}, path)
    with deferred_init():
        model = WithCopies(kind, moves=False)
        del model.before
    materialize(model, checkpoint=path)
    assert_as_plain(model.model, plain(kind, state))
    assert_as_plain(model.after, plain(kind, state))


def test_packed_weights_of_another_size_are_refused(file: Path, tmp_path: Path) -> None:
    state = plain("nf4", load_file(file)).state_dict()
    swapped = {
        name.replace("down.", "?").replace("up.", "down.").replace("?", "up."): tensor for name, tensor in state.items()
    }
    swapped["up.bias"] = swapped.pop("down.bias")
    save_file(swapped, tmp_path / "packed.safetensors")
    model = recorded("nf4")
    with pytest.raises(CheckpointMismatchError, match=r"up\.weight is \(128, 64\) in the model and, quantized"):
        materialize(model, checkpoint=tmp_path / "packed.safetensors")
    materialize(model, checkpoint=file)
    assert_as_plain(model, plain("nf4", load_file(file)))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_without_their_scales_are_refused(kind: str, file: Path, tmp_path: Path) -> None:
    state = plain(kind, load_file(file)).state_dict()
    bare = {name: tensor for name, tensor in state.items() if name in load_file(file)}
    save_file(bare, tmp_path / "packed.safetensors")
    for moved in (False, True):
        with pytest.raises(CheckpointMismatchError, match=r"up\.weight"):
            materialize(recorded(kind, moved=moved), checkpoint=tmp_path / "packed.safetensors")


@pytest.mark.parametrize("kind", ["nf4, double", "int8"])
def test_a_cast_before_the_load_counts(kind: str, file: Path) -> None:
    with deferred_init():
        model = Model(kind).bfloat16()
    materialize(model, checkpoint=file)
    wanted = Model(kind).bfloat16()
    wanted.load_state_dict(load_file(file))
    assert_same(everything(model), everything(wanted.to("cpu")))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bitsandbytes.nn.EmbeddingNF4(TOKENS, WIDTH),
        lambda: bitsandbytes.nn.Embedding8bit(TOKENS, WIDTH),
        lambda: bitsandbytes.nn.Linear8bitLt(WIDTH, TOKENS, bias=False),  # keeps floats
    ],
    ids=["EmbeddingNF4", "Embedding8bit", "Linear8bitLt with has_fp16_weights"],
)
def test_other_layers_are_what_moving_makes_of_them(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    save_file({"weight": torch.randn(TOKENS, WIDTH)}, tmp_path / "one.safetensors")
    with deferred_init():
        found = make()
    materialize(found, checkpoint=tmp_path / "one.safetensors")
    wanted = make()
    wanted.load_state_dict(load_file(tmp_path / "one.safetensors"))
    assert_same(everything(found), everything(wanted.to("cpu")))


def test_transformers_quantizes_what_it_loads_in_a_block(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    wanted = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=how)
    with deferred_init():
        found = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=how)
    with pytest.raises(CheckpointMismatchError, match="7 of 12 tensors do not fit"):
        materialize(found, checkpoint=tmp_path)
    materialize(found)
    assert_same(everything(found), everything(wanted))
    tokens = torch.arange(6)[None]
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)


@pytest.mark.parametrize("kind", ["nf4, double", "int8"])
def test_fabric_quantizes_what_it_declares(kind: str, file: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(checkpoint=file):
        model = Model(kind)
    assert_same(everything(model), everything(plain(kind, load_file(file))))
    ready = fabric.setup(model)
    assert_same(everything(model), everything(plain(kind, load_file(file))))
    assert torch.equal(ready(torch.arange(4)), plain(kind, load_file(file))(torch.arange(4)))
    assert "up.weight" in str(init_report(model))


def test_a_load_that_was_not_declared_is_as_in_plain_pytorch(file: Path) -> None:
    model = recorded("nf4")
    model.load_state_dict(load_file(file))
    assert model.up.weight.dtype == torch.float32
    assert_as_plain(model.to("cpu"), plain("nf4", load_file(file)))


# -- what cannot be done -----------------------------------------------------------------------------------------------


def test_layers_that_were_built_on_the_meta_device_by_name_are_refused(file: Path) -> None:
    with deferred_init():
        model = Model("nf4")
        model.up = bitsandbytes.nn.Linear4bit(WIDTH, 2 * WIDTH, device="meta")
    with pytest.raises(FabricInitError, match=r"up \(Linear4bit\) was built on the meta device"):
        materialize(model, checkpoint=file)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_lightnings_layers_are_refused_and_converting_afterwards_is_not(mode: Any, file: Path) -> None:
    precision = BitsandbytesPrecision(mode, dtype=torch.float16)
    with deferred_init(), precision.module_init_context():
        model = Model("float")
    with pytest.raises(FabricInitError, match="a layer of Lightning's BitsandbytesPrecision"):
        materialize(model, checkpoint=file)
    with deferred_init():
        filled = Model("float")
    materialize(filled, checkpoint=file)
    wanted = Model("float")
    wanted.load_state_dict(load_file(file))
    found, wanted = (precision.convert_module(each).to("cpu") for each in (filled, wanted))
    assert_same(everything(found), everything(wanted))


def test_fabric_converts_the_layers_of_a_filled_model_as_those_of_a_loaded_one(file: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    # as plugins=[…] does on CUDA, which Lightning insists on
    fabric.strategy.precision = fabric._precision = BitsandbytesPrecision("nf4", dtype=torch.float16)
    with pytest.raises(FabricInitError, match=r"Fill the model with its own layers first.*fabric\.setup"):
        fabric.init_module(checkpoint=file).__enter__()
    with deferred_init():
        filled = Model("float")
    materialize(filled, checkpoint=file)
    wanted = Model("float")
    wanted.load_state_dict(load_file(file))
    found, loaded = (fabric.setup(each).module for each in (filled, wanted))
    assert isinstance(found.up, bitsandbytes.nn.Linear4bit)
    assert_same(everything(found), everything(loaded))


# -- LoRA on top -------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, target_modules=["up", "down"])
NAMES = {
    r"^(up|down)\.(.*)": r"base_model.model.\1.base_layer.\2",
    r"^(embedding|head)\.": r"base_model.model.\1.",
}


def with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(11)
    return get_peft_model(model, LORA)  # type: ignore[arg-type, return-value]


def losses(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        tokens, targets = torch.randint(0, TOKENS, (2, 8), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def adapters_after(file: Path) -> nn.Module:
    model = recorded("nf4, double")
    materialize(model, checkpoint=file)
    return with_adapters(model)


def adapters_in_a_second_block(file: Path) -> nn.Module:
    model = recorded("nf4, double")
    torch.manual_seed(11)
    with deferred_init(rng="eager"):
        both = with_adapters(model)
    materialize(both, checkpoint=file, rename=NAMES, strict=False)
    return both


def adapters_on_what_was_moved(file: Path) -> nn.Module:
    model = recorded("nf4, double", moved=True)
    torch.manual_seed(11)
    with deferred_init(rng="eager"):
        both = with_adapters(model)
    materialize(both, checkpoint=file, rename=NAMES, strict=False)
    return both


@pytest.mark.parametrize("build", [adapters_after, adapters_in_a_second_block, adapters_on_what_was_moved])
def test_adapters_on_a_quantized_base_train_as_in_plain_pytorch(build: Callable[[Path], nn.Module], file: Path) -> None:
    wanted = with_adapters(plain("nf4, double", load_file(file)))
    model = build(file)
    assert_same(everything(model), everything(wanted))
    assert losses(model) == losses(wanted)


# -- two ranks of FSDP2 ------------------------------------------------------------------------------------------------


def sharded(model: nn.Module) -> nn.Module:
    for name in ("up", "down"):
        fully_shard(model.get_submodule(f"base_model.model.{name}"))
    return fully_shard(model)


def on_ranks(file: str, part: str, packed: str) -> None:
    torch.distributed.init_process_group("gloo")
    storage = torch.float32  # a dtype that FSDP can gather, as bitsandbytes and peft ask for
    wanted = sharded(with_adapters(plain("nf4, double", load_file(file), storage)))
    model = recorded("nf4, double", storage, moved=True)
    torch.manual_seed(11)
    with deferred_init(rng="eager"):
        both = with_adapters(model)
    sharded(both)
    materialize(both, checkpoint=file, rename=NAMES, strict=False)
    assert_same(everything(both), everything(wanted))
    assert losses(both) == losses(wanted)

    for path in (None, part):  # from scratch, and with a missing head
        state = {} if path is None else load_file(path)
        whole = sharded(with_adapters(plain("nf4, double", state, storage)))
        torch.manual_seed(5)
        with deferred_init(rng="eager"):
            other = Model("nf4, double", storage).to("cpu")
            torch.manual_seed(11)
            other = with_adapters(other)  # type: ignore[assignment]
        sharded(other)
        if path is None:
            materialize(other)
        else:
            materialize(other, checkpoint=path, rename=NAMES, strict=False)
        assert_same(everything(other), everything(whole))

    late = recorded("nf4, double", storage)
    fully_shard(late.up)
    with pytest.raises(FabricInitError, match=r"the weight of up \(FSDPLinear4bit\) was sharded, or replaced, before"):
        materialize(late, checkpoint=file)
    again = recorded("nf4, double", storage, moved=True)
    fully_shard(again)
    with pytest.raises(CheckpointMismatchError, match="Not in the model"):
        materialize(again, checkpoint=packed)


def under_fabric(file: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp2")
    fabric.launch()
    with fabric.init_module(checkpoint=file):
        model = Model("nf4, double", torch.float32)
    ready = fabric.setup(model)
    found = everything(ready.module)
    assert isinstance(ready.module.up.weight, DTensor)
    wanted = plain("nf4, double", load_file(file), torch.float32)
    assert_same({name: found[name] for name in everything(wanted) if name in found}, everything(wanted))
    tokens = torch.arange(4)
    assert torch.equal(ready(tokens), wanted(tokens))


def test_fabric_quantizes_before_it_shards(file: Path) -> None:
    run_ranks(2, under_fabric, file=str(file))


def test_two_ranks_hold_their_parts_of_what_one_process_quantizes(file: Path, tmp_path: Path) -> None:
    lacking = {name: tensor for name, tensor in load_file(file).items() if name not in ("up.weight", "head.weight")}
    save_file(lacking, tmp_path / "part.safetensors")
    save_file(plain("nf4, double", load_file(file), torch.float32).state_dict(), tmp_path / "packed.safetensors")
    part, packed = tmp_path / "part.safetensors", tmp_path / "packed.safetensors"
    run_ranks(2, on_ranks, file=str(file), part=str(part), packed=str(packed))


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURED = """
import re, sys, threading, time
import bitsandbytes, torch
from safetensors.torch import save_file
from torch import nn
from fabric_init import deferred_init, materialize

torch.set_num_threads(1)
LAYERS, OUT, IN = 10, 1536, 2048

def private():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1])

def peak_of(function):
    base, tops, running = private(), [0], True
    def watch():
        while running:
            tops.append(private())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    result = function()
    running = False
    thread.join()
    return max(tops) - base, private() - base, result

def filled(layers, out, file):
    with deferred_init():
        model = nn.Sequential(*(bitsandbytes.nn.LinearNF4(IN, out, bias=False) for _ in range(layers)))
    materialize(model, checkpoint=file)
    return model

filled(1, 8, None)  # what is imported and cached at first
save_file({f"{i}.weight": torch.randn(OUT, IN) for i in range(LAYERS)}, sys.argv[1])
one = torch.randn(OUT, IN)
alone, _, _ = peak_of(lambda: bitsandbytes.functional.quantize_4bit(one, quant_type="nf4", compress_statistics=True)[0])
for file in (sys.argv[1], None):
    peak, kept, model = peak_of(lambda: filled(LAYERS, OUT, file))
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(size, one.nbytes, alone, peak, kept)
    del model
"""


def test_no_more_than_one_float_weight_is_held_at_a_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "model.safetensors")],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)},  # else freed memory stays in the heap
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [list(map(int, line.split())) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(rows) == 2, "from a checkpoint, and from scratch"
    for size, largest, alone, peak, kept in rows:
        assert LAYERS_AS_FLOATS * largest > 5 * size, "the model as floats would show"
        assert kept < 1.2 * size + largest
        assert peak < 1.2 * size + alone + 2 * largest, "`alone` is what bitsandbytes' own kernel takes for one weight"


LAYERS_AS_FLOATS = 10


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_beside_the_layers_is_no_obstacle(tmp_path: Path) -> None:
    def build(kind: type[nn.Module]) -> nn.Module:
        return nn.Sequential(kind(64, 64), torch.jit.script(nn.ReLU()))

    floats = build(nn.Linear)
    save_file(floats.state_dict(), tmp_path / "floats.safetensors")
    with deferred_init():
        model = build(bitsandbytes.nn.LinearNF4)
    materialize(model, checkpoint=tmp_path / "floats.safetensors")
    expected = build(bitsandbytes.nn.LinearNF4)
    expected.load_state_dict(floats.state_dict())
    assert torch.equal(model[0].weight, expected.to("cpu")[0].weight)
