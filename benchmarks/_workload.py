"""The model and the files that every contender for a Llama gets: the same weights in each format.

The checkpoint holds *half* of what eager init from seed 0 gives. Halving is exact in bf16, so one file is the reference
for both groups, and a tensor that was initialized but never loaded (a norm's ones, say) does not pass for loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

INIT_SEED = 0
INIT_OVER_CHECKPOINT = 2  # eager init == 2 x the checkpoint


@dataclass(frozen=True)
class Shape:
    """A Llama; the defaults are TinyLlama's 1.1 B parameters."""

    hidden: int = 2048
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    intermediate: int = 5632
    vocab: int = 32000

    @property
    def largest_bytes(self) -> int:
        """Of the largest tensor."""
        return max(self.vocab, self.intermediate, self.hidden) * self.hidden * 2

    def config(self) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )


@dataclass(frozen=True)
class Workload:
    root: Path

    @property
    def folder(self) -> Path:
        """Hugging Face layout: config.json and model.safetensors."""
        return self.root / "checkpoint"

    @property
    def safetensors(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def torch_file(self) -> Path:
        """The same state dict by ``torch.save``, for Lightning's ``load_raw``."""
        return self.root / "checkpoint.pt"

    @property
    def buffers(self) -> Path:
        """The non-persistent buffers of an eager build, which no checkpoint holds."""
        return self.root / "buffers.pt"

    @property
    def manifest(self) -> Path:
        return self.root / "workload.json"


def make_workload(root: Path, shape: Shape) -> Workload:
    """Write the files, in a process of its own; files that are there already, of this shape, are kept."""
    workload = Workload(root)
    if not (workload.manifest.exists() and json.loads(workload.manifest.read_text())["shape"] == asdict(shape)):
        subprocess.run([sys.executable, __file__, str(root), json.dumps(asdict(shape))], check=True)
    return workload


def warm(path: Path) -> None:
    """Read a file through, so that its pages are in the page cache; holds one small buffer."""
    _read_through(path)


def warm_in_small_pages(path: Path) -> None:
    """The same, with a cache entry for each page by itself, as reads in random order leave it.

    Reading through makes entries of up to 2 MB, and who touches one byte of a mapped entry gets all of it.
    """
    cool(path)
    _read_through(path, os.POSIX_FADV_RANDOM)


def cool(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_through(path: Path, advice: int = os.POSIX_FADV_NORMAL) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, advice)
        while file.readinto(buffer):
            pass


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _write(workload: Workload, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    workload.folder.mkdir(parents=True, exist_ok=True)
    config = shape.config()
    torch.manual_seed(INIT_SEED)
    with default_dtype(torch.bfloat16):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(INIT_OVER_CHECKPOINT)
    weights = model.state_dict()
    config.save_pretrained(workload.folder)
    save_file(weights, workload.safetensors, metadata={"format": "pt"})
    torch.save(weights, workload.torch_file)
    torch.save({name: buffer for name, buffer in model.named_buffers() if name not in weights}, workload.buffers)
    size = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(tensor.nbytes for tensor in weights.values()),
    }
    workload.manifest.write_text(json.dumps({"shape": asdict(shape)} | size))


if __name__ == "__main__":
    _write(Workload(Path(sys.argv[1])), Shape(**json.loads(sys.argv[2])))
