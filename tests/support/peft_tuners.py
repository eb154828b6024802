"""Every tuner of peft on a small model: built in recorded blocks, it is the model that plain peft makes.

A model is described by its base weights (which must be the checkpoint's to the bit), by what peft makes of them, and by
its logits. Plain peft, from the same seed, says what is right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    AdaLoraConfig,
    AdamssConfig,
    AdaptionPromptConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    CartridgeConfig,
    CPTConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShadowConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fabric_init import CheckpointMismatchError, Fabric, FabricInitError
from fabric_init.recording.mode import RecordMode
from tests.support.zoo import inner, launch, weights, whole

VOCABULARY, WIDTH = 32, 16
TOKENS = torch.arange(8).view(2, 4)
QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


@dataclass(frozen=True)
class Files:
    folder: Path

    def base(self, tied: bool) -> Path:
        return self.folder / ("tied.pt" if tied else "untied.pt")

    @property
    def adapters(self) -> dict[str, str]:
        return {str(number): str(self.folder / f"adapter {number}") for number in range(2)}


@dataclass(frozen=True)
class Tuner:
    """A configuration of peft; ``derives``: whether its init reads the base weights, or writes them."""

    make: Callable[[Files], Any]
    derives: bool = False
    tied: bool = False


def lora(**options: Any) -> Callable[[Files], Any]:
    return lambda files: LoraConfig(**{"r": 4, "target_modules": QV, **options})


def adamss(**options: Any) -> Any:
    return AdamssConfig(target_modules=QV, r=8, num_subspaces=2, **options)


def frod(**options: Any) -> Any:
    return FrodConfig(**{"target_modules": QV, "progressbar": False, "sparse_rate": 0.1, **options})


TUNERS: dict[str, Tuner] = {
    "LORA": Tuner(lora()),
    "LORA all-linear": Tuner(lora(target_modules="all-linear")),
    "LORA rslora": Tuner(lora(use_rslora=True)),
    "LORA gaussian": Tuner(lora(init_lora_weights="gaussian")),
    "LORA orthogonal": Tuner(lora(init_lora_weights="orthogonal")),
    "LORA no init": Tuner(lora(init_lora_weights=False)),
    "LORA embeddings": Tuner(lora(target_modules=["embed_tokens", "q_proj"])),
    "LORA embeddings, tied": Tuner(lora(target_modules=["embed_tokens", "q_proj"]), tied=True),
    "LORA target_parameters": Tuner(lora(target_parameters=["q_proj.weight"], target_modules=[])),
    "LORA layer_replication": Tuner(lora(layer_replication=[(0, 2), (1, 2)])),
    "LORA dora": Tuner(lora(use_dora=True), derives=True),
    "LORA dora embeddings": Tuner(lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]), derives=True),
    "LORA pissa": Tuner(lora(init_lora_weights="pissa"), derives=True),
    "LORA pissa_niter": Tuner(lora(init_lora_weights="pissa_niter_4"), derives=True),
    "LORA pissa dora": Tuner(lora(init_lora_weights="pissa", use_dora=True), derives=True),
    "LORA olora": Tuner(lora(init_lora_weights="olora"), derives=True),
    "LORA mica": Tuner(lora(init_lora_weights="mica"), derives=True),
    "LORA lora_ga no data": Tuner(lora(init_lora_weights="lora_ga"), derives=True),
    "LORA modules_to_save": Tuner(lora(modules_to_save=["lm_head"]), derives=True),
    "LORA modules_to_save, tied": Tuner(lora(modules_to_save=["lm_head"]), derives=True, tied=True),
    "LORA modules_to_save norm": Tuner(lora(modules_to_save=["input_layernorm", "embed_tokens"]), derives=True),
    "LORA trainable tokens": Tuner(lora(trainable_token_indices=[1, 3]), derives=True),
    "LORA trainable tokens, tied": Tuner(lora(trainable_token_indices=[1, 3]), derives=True, tied=True),
    "LORA kasa": Tuner(lora(kasa_config=KasaConfig()), derives=True),
    "LORA bdlora": Tuner(
        lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2))
    ),
    "ADALORA": Tuner(lambda files: AdaLoraConfig(target_modules=QV, init_r=4, target_r=2, total_step=10)),
    "ADAMSS": Tuner(lambda files: adamss(), derives=True),
    "ADAMSS dynamic": Tuner(
        lambda files: AdamssConfig(
            target_modules=QV, r=8, num_subspaces=2, subspace_rank=2, use_dynamic_rank=True, svd_threshold=0.5
        ),
        derives=True,
    ),
    "ADAMSS asa": Tuner(lambda files: adamss(use_asa=True), derives=True),
    "ADAPTION_PROMPT": Tuner(lambda files: AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **TEXT)),
    "BEFT": Tuner(lambda files: BeftConfig(target_modules=["v_proj"])),
    "BOFT": Tuner(lambda files: BOFTConfig(target_modules=QV, boft_block_size=4)),
    "C3A": Tuner(lambda files: C3AConfig(target_modules=QV, block_size=8)),
    "CARTRIDGE": Tuner(lambda files: CartridgeConfig(num_virtual_tokens=4, **TEXT)),
    "CPT": Tuner(
        lambda files: CPTConfig(cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], **TEXT),
        derives=True,
    ),
    "DEFT": Tuner(lambda files: DeftConfig(target_modules=QV, r=4), derives=True),
    "DEFT qr": Tuner(lambda files: DeftConfig(target_modules=QV, r=4, decomposition_method="qr"), derives=True),
    "DELORA": Tuner(lambda files: DeloraConfig(target_modules=QV, r=4), derives=True),
    "FOURIERFT": Tuner(lambda files: FourierFTConfig(target_modules=QV, n_frequency=10)),
    "FOURIERFT zero": Tuner(lambda files: FourierFTConfig(target_modules=QV, n_frequency=10, init_weights=True)),
    "FROD": Tuner(lambda files: frod(), derives=True),
    "FROD unsaved": Tuner(
        lambda files: frod(save_projection=False),
        derives=True,
    ),
    "FROD all": Tuner(lambda files: frod(target_modules=ALL), derives=True),
    "GLORA": Tuner(lambda files: GloraConfig(target_modules=QV, r=4)),
    "GRALORA": Tuner(lambda files: GraloraConfig(target_modules=QV, r=4, alpha=8)),
    "HIRA": Tuner(lambda files: HiraConfig(target_modules=QV, r=4)),
    "HRA": Tuner(lambda files: HRAConfig(target_modules=QV, r=4)),
    "IA3": Tuner(lambda files: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "LILY": Tuner(lambda files: LilyConfig(target_modules=QV, r=4)),
    "LN_TUNING": Tuner(lambda files: LNTuningConfig(target_modules=["input_layernorm", "norm"]), derives=True),
    "LOHA": Tuner(lambda files: LoHaConfig(target_modules=QV, r=4)),
    "LOKR": Tuner(lambda files: LoKrConfig(target_modules=QV, r=4)),
    "LOKR lycoris": Tuner(lambda files: LoKrConfig(target_modules=QV, r=4, init_weights="lycoris")),
    "MISS": Tuner(lambda files: MissConfig(target_modules=QV, r=4)),
    "MISS bat": Tuner(lambda files: MissConfig(target_modules=QV, r=4, init_weights="bat")),
    "MISS mini": Tuner(lambda files: MissConfig(target_modules=QV, r=4, mini_r=4, init_weights="mini")),
    "MULTITASK_PROMPT_TUNING": Tuner(
        lambda files: MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, **TEXT)
    ),
    "OFT": Tuner(lambda files: OFTConfig(target_modules=QV, oft_block_size=4, r=0)),
    "OFT coft": Tuner(lambda files: OFTConfig(target_modules=QV, oft_block_size=4, r=0, coft=True, block_share=True)),
    "OSF": Tuner(lambda files: OSFConfig(target_modules=QV, effective_rank=4), derives=True),
    "PEANUT": Tuner(lambda files: PeanutConfig(target_modules=QV, r=4)),
    "POLY": Tuner(lambda files: PolyConfig(target_modules=QV, r=4, n_tasks=2, n_skills=2, **TEXT)),
    "PREFIX_TUNING": Tuner(lambda files: PrefixTuningConfig(num_virtual_tokens=4, **TEXT)),
    "PREFIX_TUNING projection": Tuner(
        lambda files: PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, **TEXT)
    ),
    "PROMPT_TUNING": Tuner(lambda files: PromptTuningConfig(num_virtual_tokens=4, **TEXT)),
    "PROMPT_TUNING vocab": Tuner(
        lambda files: PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", **TEXT), derives=True
    ),
    "PSOFT": Tuner(lambda files: PsoftConfig(target_modules=QV, r=4), derives=True),
    "PSOFT pissa": Tuner(lambda files: PsoftConfig(target_modules=QV, r=4, ab_svd_init="pissa_init"), derives=True),
    "PSOFT lowrank": Tuner(lambda files: PsoftConfig(target_modules=QV, r=4, psoft_svd="lowrank"), derives=True),
    "PVERA": Tuner(lambda files: PveraConfig(target_modules=QV, r=4)),
    "P_TUNING": Tuner(lambda files: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **TEXT)),
    "RANDLORA": Tuner(lambda files: RandLoraConfig(target_modules=QV, r=4)),
    "RANDLORA sparse": Tuner(lambda files: RandLoraConfig(target_modules=QV, r=4, sparse=True)),
    "ROAD": Tuner(lambda files: RoadConfig(target_modules=QV, group_size=4)),
    "SHADOW": Tuner(lambda files: ShadowConfig(r=4, shadow_dropout=0.0, **TEXT), derives=True),
    "SHIRA": Tuner(lambda files: ShiraConfig(target_modules=QV, r=2, random_seed=5)),
    "SUPERTUNING": Tuner(lambda files: SupertuningConfig(target_modules=QV, sparsity=0.9), derives=True),
    "SUPERTUNING bottom, r": Tuner(
        lambda files: SupertuningConfig(target_modules=QV, sparsity=0.9, select_top=False, r=2), derives=True
    ),
    "TINYLORA": Tuner(lambda files: TinyLoraConfig(target_modules=QV, r=2, u=4), derives=True),
    "TRAINABLE_TOKENS": Tuner(lambda files: TrainableTokensConfig(token_indices=[1, 3]), derives=True),
    "TRAINABLE_TOKENS, tied": Tuner(lambda files: TrainableTokensConfig(token_indices=[1, 3]), derives=True, tied=True),
    "UNILORA": Tuner(lambda files: UniLoraConfig(target_modules=QV, r=4, theta_d_length=32)),
    "VBLORA": Tuner(lambda files: VBLoRAConfig(target_modules=QV, r=4, num_vectors=8, vector_length=4)),
    "VERA": Tuner(lambda files: VeraConfig(target_modules=QV, r=4)),
    "VERA unsaved": Tuner(lambda files: VeraConfig(target_modules=QV, r=4, save_projection=False)),
    "WAVEFT": Tuner(lambda files: WaveFTConfig(target_modules=QV, n_frequency=10)),
    "XLORA": Tuner(lambda files: XLoraConfig(hidden_size=WIDTH, adapters=files.adapters, xlora_size=8, **TEXT)),
}
"""By the name of its ``PeftType``, with what is special about the configuration."""


# -- ways --------------------------------------------------------------------------------------------------------------


def plain(tuner: Tuner, files: Files, seed: int, *, rebuilt: bool) -> Any:
    """``rebuilt``: the generator gives the base model's init as well, as in one block."""
    torch.manual_seed(seed)
    base = llama(tuner.tied)
    base.load_state_dict(torch.load(files.base(tuner.tied)))
    if not rebuilt:
        torch.manual_seed(seed)
    return get_peft_model(base, tuner.make(files))


def one_block(fabric: Any, tuner: Tuner, files: Files, seed: int) -> Any:
    """With what the errors propose: names, and then the model's own init where only the adapter is missing."""
    options: dict[str, Any] = {}
    while True:
        torch.manual_seed(seed)
        try:
            with fabric.init_module(checkpoint=files.base(tuner.tied), **options):
                model = get_peft_model(llama(tuner.tied), tuner.make(files))
        except CheckpointMismatchError as error:
            proposed = re.findall(r"Likely: (.*?) would (?:load|match)", str(error))
            if options and "Missing" in str(error) and "Not in the model" not in str(error):
                proposed = ["strict=False"]
            more = eval(f"dict({proposed[0]})") if proposed else {}
            if not more.keys() - options.keys():
                raise
            options |= more
        else:
            return model


def two_blocks(fabric: Any, tuner: Tuner, files: Files, seed: int) -> Any:
    with fabric.init_module(checkpoint=files.base(tuner.tied)):
        base = llama(tuner.tied)
    torch.manual_seed(seed)
    with fabric.init_module(empty_init=True):
        model = get_peft_model(base, tuner.make(files))
    fabric.init_missing(model)
    return model


def after(fabric: Any, tuner: Tuner, files: Files, seed: int) -> Any:
    with fabric.init_module(checkpoint=files.base(tuner.tied)):
        base = llama(tuner.tied)
    torch.manual_seed(seed)
    return get_peft_model(base, tuner.make(files))


WAYS: dict[str, Callable[[Any, Tuner, Files, int], Any]] = {
    "one block": one_block,
    "two blocks": two_blocks,
    "after": after,
}


# -- what a model is ---------------------------------------------------------------------------------------------------

_OF_TORCH = set(vars(nn.Module())) | {"forward", "prepare_inputs_for_generation"}


_OF_STRATEGIES = ("_fsdp", "_is_fsdp", "_ds", "ds_", "_original_parameters", "_external_params", "_fabric", "_is_hf")


def values_in(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The tensors and numbers that an attribute holds, under names of their own."""
    if isinstance(value, Tensor):
        yield name, whole(value) if not value.is_meta else value
    elif isinstance(value, (bool, int, float, str, torch.device, torch.dtype, type(None))):
        yield name, value
    elif depth < 4 and isinstance(value, dict):
        for key, each in value.items():
            yield from values_in(f"{name}[{key!r}]", each, depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple, set)):
        for at, each in enumerate(sorted(value, key=str) if isinstance(value, set) else value):
            yield from values_in(f"{name}[{at}]", each, depth + 1)


def attributes(model: nn.Module) -> dict[str, Any]:
    """What the modules hold beside parameters and buffers."""
    found: dict[str, Any] = {}
    for path, module in inner(model).named_modules():
        for name, value in vars(module).items():
            if name not in _OF_TORCH and not name.startswith(_OF_STRATEGIES):
                found.update(values_in(f"{path}.{name}", value))
    return found


class Found(NamedTuple):
    tensors: dict[str, Tensor]
    attributes: dict[str, Any]
    logits: Tensor
    trainable: frozenset[str]


def logits_of(model: Any) -> Tensor:
    torch.manual_seed(9)
    model.eval()
    with torch.no_grad():
        user_model: Any = inner(model)
        kind = user_model.active_peft_config.peft_type
        tasks = {"task_ids": torch.tensor([0, 1])} if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
        logits: Tensor = model(TOKENS, **tasks).logits
    return logits.float()


def look(model: Any) -> Found:
    trainable = frozenset(name for name, value in inner(model).named_parameters() if value.requires_grad)
    return Found(weights(model), attributes(model), logits_of(model), trainable)


def differences(found: Found, wanted: Found, other: Found, checkpoint: Iterable[Tensor]) -> list[str]:
    """What differs from plain peft's model; what comes from the checkpoint unchanged must be the same to the bit.

    ``other``: what plain peft makes from another seed, which tells what is drawn.
    """
    wrong = [f"names {sorted(ours ^ theirs)[:4]}" for ours, theirs in [_names(found, wanted)] if ours != theirs]
    for name in found.tensors.keys() & wanted.tensors.keys():
        mine, right = found.tensors[name], wanted.tensors[name]
        if mine.dtype != right.dtype or mine.shape != right.shape:
            wrong.append(f"{name}: {mine.dtype} {tuple(mine.shape)}, not {right.dtype} {tuple(right.shape)}")
        elif not _agree(mine, right):
            drawn = " (drawn)" if not torch.equal(other.tensors[name], right) else ""
            wrong.append(f"{name} is off by {(mine - right).abs().max():.2g}{drawn}")
        elif not torch.equal(mine, right) and any(torch.equal(value, right) for value in checkpoint):
            wrong.append(f"{name} is not to the bit")
    missing = object()
    for name in found.attributes.keys() | wanted.attributes.keys():
        mine, right = found.attributes.get(name, missing), wanted.attributes.get(name, missing)
        if not _agree(mine, right):
            wrong.append(f"attribute {name} is {mine}, not {right}"[:300])
    if found.trainable != wanted.trainable:
        wrong.append(f"trainable {sorted(found.trainable ^ wanted.trainable)[:3]}")
    if not _agree(found.logits, wanted.logits):
        wrong.append("logits")
    return wrong


def _names(*several: Found) -> tuple[set[str], ...]:
    return tuple(set(found.tensors) for found in several)


def _agree(mine: Any, right: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(right, Tensor):
        return not mine.is_meta and mine.shape == right.shape and torch.allclose(mine, right.to(mine.dtype), atol=1e-5)
    if isinstance(mine, float) and isinstance(right, float):
        return mine == right or math.isclose(mine, right, rel_tol=1e-6)
    return type(mine) is type(right) and bool(mine == right)


def outcome(fabric: Any, name: str, way: str, files: Files) -> str:
    """``equal``, ``refused: its error``, ``not here: why plain peft cannot``, or ``WRONG: what``."""
    tuner = TUNERS[name]
    try:
        wanted, other = (look(plain(tuner, files, seed, rebuilt=way == "one block")) for seed in (3, 4))
    except Exception as error:
        return f"not here: {type(error).__name__}: {error}"
    try:
        found = look(fabric.setup(WAYS[way](fabric, tuner, files, 3)))
    except FabricInitError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    wrong = differences(found, wanted, other, torch.load(files.base(tuner.tied)).values())
    return f"WRONG: {len(wrong)} differences: {'; '.join(sorted(wrong)[:6])}" if wrong else "equal"


def outcomes(strategy: str, way: str, names: Iterable[str], files: Files) -> dict[str, str]:
    """What becomes of each tuner in this process, or on this rank."""
    fabric = launch(strategy) if strategy != "one device" else Fabric(accelerator="cpu", devices=1)
    with random_values_of_plain_pytorch():
        return {name: outcome(fabric, name, way, files) for name in names}


@contextmanager
def random_values_of_plain_pytorch() -> Iterator[None]:
    """Let blocks of a Fabric draw what plain PyTorch draws, so that also what is drawn can be compared to the bit."""
    init: Any = RecordMode.__init__
    before = init.__defaults__
    assert before == ("per_op", int)
    init.__defaults__ = ("eager", int)
    try:
        yield
    finally:
        init.__defaults__ = before


def write_files(folder: Path) -> Files:
    """Write the base model, with and without a tie, and two adapters for X-LoRA."""
    files = Files(folder)
    for tied in (False, True):
        torch.manual_seed(77)
        torch.save(llama(tied).state_dict(), files.base(tied))
    for seed, adapter in enumerate(files.adapters.values()):
        torch.manual_seed(80 + seed)
        config = LoraConfig(r=2, target_modules=QV, init_lora_weights=False, **TEXT)
        get_peft_model(llama(), config).save_pretrained(adapter)
    return files
