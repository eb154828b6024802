"""deferred_init and materialize in plain PyTorch: from scratch, and from a checkpoint.

Run it with ``python plain_pytorch.py``; it needs nothing but the package itself.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import fabric_init


class Classifier(nn.Module):
    """A model like any other: it knows nothing of fabric_init."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, batch_first=True)
        self.head = nn.Linear(64, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(dim=1))


tokens = torch.randint(1, 1000, (2, 16))

# From scratch. In the block no init runs and no memory is taken; materialize then writes every tensor once.
torch.manual_seed(0)
with fabric_init.deferred_init():
    model = Classifier(classes=10)
print(f"in the block: {model.head.weight.device}, {model.head.weight.shape}")
print(fabric_init.materialize(model))
assert model.eval()(tokens).isfinite().all()

# The same seed gives the same weights, whatever else happens in between.
torch.manual_seed(0)
with fabric_init.deferred_init():
    again = Classifier(classes=10)
torch.randn(1000)
fabric_init.materialize(again)
assert torch.equal(model.head.weight, again.head.weight)

with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder, "model.safetensors")
    save_file(model.state_dict(), checkpoint)

    # From a checkpoint that has everything. A missing or unexpected key would be an error.
    with fabric_init.deferred_init():
        loaded = Classifier(classes=10)
    fabric_init.materialize(loaded, checkpoint=checkpoint)
    assert torch.equal(loaded.eval()(tokens), model(tokens))

    # The same body under a head of another size, which gets the model's own init.
    with fabric_init.deferred_init():
        finetuned = Classifier(classes=3)
    report = fabric_init.materialize(finetuned, checkpoint=checkpoint, reinit=["head.*"])
    print()
    print(report)
    assert finetuned(tokens).shape == (2, 3)
