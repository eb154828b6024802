"""Never empty: whatever a checkpoint lacks, every tensor is loaded or initialized, or its name is in an error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, UninitializedTensorError, deferred_init, materialize


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN (or the largest integer), so that nothing that was forgotten looks like a value."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _small(config: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, config)(**sizes)


def _hf(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(_small(config, **sizes))

    return build


IDS = torch.tensor([[1, 2, 3, 4]])
_DECODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
_ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "llama": (_hf("LlamaForCausalLM", "LlamaConfig", **_DECODER), {"input_ids": IDS}),
    "llama tied": (_hf("LlamaForCausalLM", "LlamaConfig", **_DECODER, tie_word_embeddings=True), {"input_ids": IDS}),
    "mixtral": (
        _hf("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=2, num_experts_per_tok=1),
        {"input_ids": IDS},
    ),
    "bert": (
        _hf("BertForMaskedLM", "BertConfig", vocab_size=32, max_position_embeddings=16, **_ENCODER),
        {"input_ids": IDS},
    ),
    "gpt2": (
        _hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=32,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        {"input_ids": IDS},
    ),
    "t5": (
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "vit": (
        _hf("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **_ENCODER),
        {"pixel_values": torch.ones(1, 3, 8, 8)},
    ),
    "whisper": (
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=32,
            num_mel_bins=4,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            begin_suppress_tokens=None,
        ),
        {"input_features": torch.ones(1, 4, 16), "decoder_input_ids": IDS},
    ),
    "wav2vec2": (
        _hf(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            vocab_size=32,
            conv_dim=(8, 8),
            conv_kernel=(4, 2),
            conv_stride=(4, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
            mask_time_prob=0.0,
            **_ENCODER,
        ),
        {"input_values": torch.linspace(-1, 1, 64)[None]},
    ),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.forget_gates()

    @torch.no_grad()
    def forget_gates(self) -> None:
        for name, parameter in self.rnn.named_parameters():
            if "bias" in name:
                parameter[4:8] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.rnn(x)[0])[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x[..., :3], x[..., :3])[0]


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 1),
        nn.BatchNorm1d(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
    )


class Attributes(nn.Module):
    """Tensors in every place that a module can keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("saved", torch.eye(3))
        self.frequencies = 1.0 / (10.0 ** (torch.arange(3) / 3))
        self.cached = {"cos": torch.arange(3).cos(), "list": [torch.arange(3).sin()]}
        self.index = torch.arange(3).unsqueeze(0).expand(1, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.weight * self.frequencies + self.cached["cos"] + self.cached["list"][0]) @ self.saved
        return x.masked_fill(~self.mask[-1], 0.0)[..., self.index[0]]


TORCH: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "norms": (_norms, torch.ones(2, 3, 5)),
    "recurrent": (Recurrent, torch.ones(2, 5, 3)),
    "attention": (Attention, torch.ones(2, 5, 4)),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False
        ),
        torch.ones(1, 3, 4),
    ),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.ReLU()),
        torch.ones(1, 3),
    ),
    "spectral_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))),
        torch.ones(1, 3),
    ),
    "orthogonal": (lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))), torch.ones(1, 3)),
    "old spectral_norm": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3))), torch.ones(1, 3)),
    "attributes": (Attributes, torch.ones(2, 3)),
    "embedding with padding": (lambda: nn.Embedding(5, 3, padding_idx=2), torch.tensor([0, 2])),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), torch.ones(1, 3, dtype=torch.complex64)),
}

EVERY: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    **{
        name: (build, lambda model, inputs=inputs: model(**inputs)[0]) for name, (build, inputs) in TRANSFORMERS.items()
    },
    **{name: (build, lambda model, x=x: model(x)) for name, (build, x) in TORCH.items()},
}
MODELS = pytest.mark.parametrize("name", EVERY)


def _in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _in(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _in(item, f"{path}[{index}]")


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers of both kinds, and every tensor among the modules' plain attributes."""
    internals = vars(nn.Module())
    found = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in internals:
                found.update(_in(value, f"{prefix}.{name}"))
    return found


def holes(model: nn.Module) -> list[str]:
    """Names of tensors on meta, or with poison in them."""
    return [
        name
        for name, tensor in everything(model).items()
        if tensor.is_meta
        or ((tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isnan().any()))
        or (tensor.dtype in (torch.int32, torch.int64) and bool((tensor == torch.iinfo(tensor.dtype).max).any()))
    ]


def checkpoint_of(build: Callable[[], nn.Module], path: Path, part: float, seed: int) -> dict[str, Tensor]:
    """A random part of a model's state dict, with ties whole or absent; no value in it is one that init would give."""
    torch.manual_seed(1000 + seed)
    chooser = random.Random(seed)
    kept: dict[int, bool] = {}
    state = {}
    for name, tensor in build().state_dict(keep_vars=True).items():
        if kept.setdefault(id(tensor), chooser.random() < part):
            value = tensor.detach().clone()
            state[name] = value + 0.03125 if value.is_floating_point() else value
    torch.save(state or {"nothing": torch.ones(1)}, path)
    return state


@MODELS
@pytest.mark.parametrize("part", [0.2, 0.7, 1.0])
def test_every_tensor_is_loaded_or_initialized_whatever_the_checkpoint_lacks(
    tmp_path: Path, name: str, part: float
) -> None:
    build, run = EVERY[name]
    state = checkpoint_of(build, tmp_path / "m.pt", part, seed=int(part * 10))
    if not state:
        part_of = checkpoint_of(build, tmp_path / "m.pt", 1.0, seed=0)
        state = dict(list(part_of.items())[:1])
        torch.save(state, tmp_path / "m.pt")
    fabric = Fabric(accelerator="cpu", devices=1)
    with poisoned_memory():
        torch.manual_seed(5)
        with fabric.init_module(checkpoint=tmp_path / "m.pt", strict=False):
            model = build()
        assert holes(model) == []
        with torch.no_grad():
            assert run(model.eval()).isfinite().all()
    report = fabric.init_report(model)
    status = {other: row.status for row in report.rows for other in (row.name, *row.ties)}
    loaded = {row.name: row for row in report.rows if row.status == "loaded"}
    assert len(loaded) == len({id(model.state_dict(keep_vars=True)[key]) for key in state})
    # one by one, against an eager model and the file
    torch.manual_seed(5)
    eager = everything(build())
    mine = everything(model)
    assert mine.keys() == eager.keys()
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert status[key] == "loaded", key
    for key in model.state_dict().keys() - state.keys():
        assert status[key] in ("initialized", "set when built"), key
    for key, tensor in mine.items():
        assert (tensor.shape, tensor.dtype) == (eager[key].shape, eager[key].dtype), key


@MODELS
def test_empty_init_is_completed_by_a_partial_load_and_by_init_missing(tmp_path: Path, name: str) -> None:
    build, run = EVERY[name]
    state = checkpoint_of(build, tmp_path / "m.pt", 0.5, seed=2)
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        probe = build()
    waiting = [row.name for row in fabric.init_report(probe).rows if row.status == "unfilled"]
    if not set(state) & set(waiting):  # a load that brings nothing of what waits completes nothing
        state[waiting[0]] = torch.ones_like(build().state_dict()[waiting[0]])
    with poisoned_memory():
        for complete in (
            lambda model: model.load_state_dict(state, strict=False),
            lambda model: model.load_state_dict(state, strict=False, assign=True),
            fabric.init_missing,
        ):
            with fabric.init_module(empty_init=True):
                model = build()
            with pytest.raises(UninitializedTensorError), torch.no_grad():
                run(model.eval())
            complete(model)
            assert holes(model) == []
            assert fabric.init_report(model).complete
            with torch.no_grad():
                assert run(model.eval()).isfinite().all()


COMPUTED = (".original0", "._u", "._v", "weight_g")
"""What weight_norm and spectral_norm compute from a weight: it follows the weight that is loaded."""


@MODELS
def test_values_do_not_depend_on_the_subset_that_is_loaded_nor_on_the_threads(tmp_path: Path, name: str) -> None:
    build, _ = EVERY[name]
    threads = torch.get_num_threads()
    found: list[tuple[set[str], dict[str, Tensor]]] = []
    try:
        for seed, part, number in ((1, 0.0, 1), (2, 0.3, 2), (3, 0.6, 1), (4, 0.0, 2)):
            torch.set_num_threads(number)
            state = checkpoint_of(build, tmp_path / "m.pt", part, seed)
            torch.manual_seed(6)
            with deferred_init():
                model = build()
            options: dict[str, Any] = {"checkpoint": tmp_path / "m.pt", "strict": False} if state else {}
            materialize(model, **options)
            found.append((set(state), {key: tensor.detach() for key, tensor in model.state_dict().items()}))
    finally:
        torch.set_num_threads(threads)
    _, whole = found[0]
    for loaded, values in found[1:]:
        for key in whole.keys() - loaded:
            if not key.endswith(COMPUTED):
                assert torch.equal(values[key], whole[key]), key


def test_two_models_in_sequence_are_not_twins() -> None:
    def critic() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        one, two = critic(), critic()
    with fabric.init_module(empty_init=True):
        three = critic()
    models = [one, two, three]
    for model in models:
        fabric.init_missing(model)
    for index, model in enumerate(models):
        for other in models[index + 1 :]:
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                assert not torch.equal(mine, theirs)


def test_poisoned_memory_does_poison_so_that_the_tests_above_can_fail() -> None:
    with poisoned_memory():
        model = nn.Module()
        model.forgotten = nn.Parameter(torch.empty(2))
        model.whole = torch.empty(2, dtype=torch.int64)
        model.held = [nn.Parameter(torch.ones(1, device="meta"))]
        assert holes(model) == ["forgotten", ".whole", ".held[0]"]


class Forgets(nn.Module):
    """What a constructor may leave unwritten: all of a tensor, a part of it, nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.empty(4))
        self.rows = nn.Parameter(torch.empty(4, 2))
        self.column = nn.Parameter(torch.empty(4, 2))
        self.pieces = nn.Parameter(torch.empty(4, 2))
        self.read_only = nn.Parameter(torch.empty(4))
        self.register_buffer("state", torch.empty(2))
        self.register_buffer("count", torch.empty(2, dtype=torch.int64))
        with torch.no_grad():
            self.rows[:3].fill_(1.0)
            self.column.select(1, 0).normal_()
            self.pieces[:2].fill_(1.0)
            self.pieces[2:].fill_(2.0)
            self.read_only.mul_(2.0)

    def forward(self) -> Tensor:
        return self.never.sum() + self.rows.sum() + self.column.sum() + self.state.sum() + self.read_only.sum()


FORGOTTEN = ["never", "rows", "column", "read_only", "state", "count"]


def test_what_the_constructor_forgets_raises_with_its_names(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.save({"pieces": torch.ones(4, 2)}, tmp_path / "m.pt")
    with deferred_init():
        recorded = Forgets()
    with fabric.init_module(empty_init=True):
        unfilled = Forgets()
    torch.save({"pieces": torch.ones(4, 2)}, tmp_path / "part.pt")

    def declared() -> None:
        with fabric.init_module(checkpoint=tmp_path / "part.pt", strict=False):
            model = Forgets()
        assert model is None, "the block was left without an error"

    for act in (
        lambda: materialize(recorded),
        lambda: materialize(recorded, checkpoint=tmp_path / "part.pt", strict=False),
        lambda: fabric.init_missing(unfilled),
        lambda: unfilled(),
        lambda: torch.save(unfilled.state_dict(), tmp_path / "x.pt"),
        declared,
    ):
        with pytest.raises(UninitializedTensorError) as caught:
            act()
        lines = {line.strip() for line in str(caught.value).splitlines()}
        assert [name for name in FORGOTTEN if name not in lines] == []
    with pytest.raises(UninitializedTensorError) as caught:
        materialize(recorded)
    assert "  pieces\n" not in str(caught.value)


@pytest.mark.parametrize(
    "derive",
    [lambda t: t * 0.02, lambda t: t.clone(), lambda t: torch.cat([t, torch.ones(2)]), lambda t: t.t().contiguous()],
    ids=["scaled", "cloned", "concatenated", "turned"],
)
def test_what_is_computed_from_forgotten_memory_is_forgotten_too(derive: Callable[[Tensor], Tensor]) -> None:
    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(derive(torch.empty(4)))

    with deferred_init():
        model = Derived()
    with pytest.raises(UninitializedTensorError, match="  weight"):
        materialize(model)


def test_what_the_constructor_forgets_may_come_from_the_checkpoint(tmp_path: Path) -> None:
    source = {name: torch.full_like(tensor, 3) for name, tensor in Forgets().state_dict().items()}
    del source["pieces"]
    torch.save(source, tmp_path / "m.pt")
    fabric = Fabric(accelerator="cpu", devices=1)
    with poisoned_memory(), fabric.init_module(checkpoint=tmp_path / "m.pt", strict=False):
        model = Forgets()
    assert holes(model) == []
    assert torch.equal(model.pieces, torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]]))


def test_a_buffer_that_is_never_saved_and_never_written_is_the_models_own_business() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("cache", torch.empty(3), persistent=False)

    with deferred_init():
        model = Cache()
    report = materialize(model)
    assert {row.name: row.status for row in report.rows} == {"weight": "initialized", "cache": "scratch"}
    assert not model.cache.is_meta
