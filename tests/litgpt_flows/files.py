"""A tiny model in litgpt's layout, and what to train it on: ``python files.py FOLDER`` writes both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.prompts import Alpaca, save_prompt_style
from litgpt.utils import save_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader

LLAMA = {"n_query_groups": 2, "bias": False, "norm_class_name": "RMSNorm", "rotary_percentage": 1.0}
LLAMA |= {"parallel_residual": False, "intermediate_size": 48}
MODELS = {
    "llama": LLAMA | {"mlp_class_name": "LLaMAMLP"},
    "neox": {"bias": True, "lm_head_bias": True},
    "experts": LLAMA | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
}


class Batches(DataLoader[Any]):
    """Saved with a model, as litdata's are; it has no position to save."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class RandomTokens(DataModule):
    """Data for pretraining, the same in every run."""

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        self.rows, self.length = batch_size, max_seq_length + 1  # the last one is only predicted

    def train_dataloader(self, seed: int = 1) -> Batches:
        tokens = torch.randint(256, (32, self.length), generator=torch.Generator().manual_seed(seed))
        return Batches(list(tokens), batch_size=self.rows)  # type: ignore[arg-type]

    def val_dataloader(self) -> Batches:
        return self.train_dataloader(seed=2)


def write_checkpoint(folder: Path, name: str) -> None:
    """Write weights that no init gives, the model's config also as an option, and a tokenizer with a token per byte."""
    folder.mkdir()
    sizes = {"block_size": 256, "n_layer": 3, "n_embd": 32, "n_head": 4, "padded_vocab_size": 264, "vocab_size": 258}
    config = Config(name=name, **sizes, **MODELS[name])
    generator = torch.Generator().manual_seed(5)
    weights = {key: torch.randn(value.shape, generator=generator) for key, value in GPT(config).state_dict().items()}
    torch.save({key: value * 0.08 + (value.dim() == 1) for key, value in weights.items()}, folder / "lit_model.pth")
    save_config(config, folder)
    option = {"model_config": yaml.safe_load((folder / "model_config.yaml").read_text(encoding="utf-8"))}
    (folder / "pretrain.yaml").write_text(yaml.dump(option), encoding="utf-8")
    save_prompt_style(Alpaca(), folder)
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in MODELS:
        write_checkpoint(root / name, name)
    (root / "data").mkdir()
    for split, numbers in (("train", range(20)), ("val", range(20, 24))):
        lines = [json.dumps({"instruction": f"Say {n} plus {n}.", "output": str(2 * n)}) for n in numbers]
        (root / "data" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
