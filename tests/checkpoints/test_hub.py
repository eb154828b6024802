"""Model ids and the cache of the Hugging Face Hub: real cache folders, and a real server that speaks its protocol."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fabric_init.checkpoints import open_checkpoint
from fabric_init.errors import CheckpointNotFoundError
from tests.support.ranks import run_ranks
from tests.support.web_server import COMMIT, Server, serving

VALUES = {"a": [1.0, 1.0], "b": [0.0, 0.0, 0.0]}


def save_model(folder: Path) -> None:
    """Two shards and an index, and what else lies in a model's repository."""
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    save_model(folder)
    with serving(folder) as state:
        yield state


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as huggingface_hub lays it out: blobs, links to them in snapshots, and what ``main`` is."""
    model = tmp_path / "cache" / "models--org--cached"
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    save_model(model / "blobs")
    for number, blob in enumerate(sorted((model / "blobs").iterdir())):
        digest = blob.rename(model / "blobs" / f"{number:064x}")
        (snapshot / blob.name).symlink_to(Path("../../blobs") / digest.name)
    return model.parent


def in_new_process(
    asked: str, cache: Path, endpoint: str = "http://127.0.0.1:9", offline: bool = False
) -> list[object]:
    """``open_checkpoint`` where the Hub's library reads its settings anew."""
    settings = {
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    (answer,) = run_ranks(1, opened, asked=asked, settings=settings, folder=cache)
    return answer


def opened(asked: str, settings: dict[str, str], folder: Path) -> list[object]:
    os.environ.update(settings)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    try:
        reader = open_checkpoint(asked)
        return [reader.format, reader.note, {key: reader.read(key).tolist() for key in reader.keys()}]
    except Exception as error:
        return [type(error).__name__, str(error)]


def test_an_id_opens_from_the_cache_without_a_network(cache: Path) -> None:
    for asked in ("org/cached", "org/cached@main", f"org/cached@{COMMIT}"):
        assert in_new_process(asked, cache, offline=asked.endswith("main")) == [
            "sharded safetensors",
            f"{asked} at commit {COMMIT}",
            VALUES,
        ]


def test_a_folder_of_the_cache_opens_and_so_does_a_snapshot(cache: Path) -> None:
    model = cache / "models--org--cached"
    for path in (model, model / "snapshots" / COMMIT):
        assert torch.equal(open_checkpoint(path).read("a"), torch.ones(2))
    (model / "refs" / "main").write_text("f" * 40)
    with pytest.raises(CheckpointNotFoundError, match=f"no snapshot of 'main'; there is {COMMIT}"):
        open_checkpoint(model)


def test_only_the_files_of_one_checkpoint_are_fetched_and_only_once(hub: Server, tmp_path: Path) -> None:
    cache = tmp_path / "empty"
    cache.mkdir()
    assert in_new_process("org/model", cache, hub.url) == [
        "sharded safetensors",
        f"org/model at commit {COMMIT}",
        VALUES,
    ]
    fetched = {one.rpartition("/")[2] for one in hub.requests if one.startswith("GET") and "/resolve/" in one}
    assert fetched == {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors", "config.json"}
    hub.reset()
    assert in_new_process("org/model", cache, hub.url)[2] == VALUES
    assert hub.requests == []


def test_what_the_cache_lacks_is_fetched(hub: Server, cache: Path) -> None:
    (cache / "models--org--cached/snapshots" / COMMIT / "model-2.safetensors").unlink()
    assert in_new_process("org/cached", cache, hub.url)[2] == VALUES
    fetched = {one.rpartition("/")[2] for one in hub.requests if one.startswith("GET") and "/resolve/" in one}
    assert "model-1.safetensors" not in fetched


@pytest.mark.parametrize("offline", [True, False])
def test_without_cache_and_network_the_error_says_so(cache: Path, offline: bool) -> None:
    kind, message = in_new_process("org/other", cache, offline=offline)
    assert kind == "CheckpointNotFoundError"
    assert "org/other: there is no such file or folder here, the model is not complete in the cache" in str(message)
    assert "hf download org/other" in str(message)


def test_a_local_folder_of_that_name_wins(hub: Server, cache: Path) -> None:
    (cache / "org" / "cached").mkdir(parents=True)
    save_file({"local": torch.ones(1)}, cache / "org" / "cached" / "model.safetensors")
    assert in_new_process("org/cached", cache, hub.url)[2] == {"local": [1.0]}
    # Nor is a slip in a path taken for an id.
    kind, message = in_new_process("org/cachde", cache, hub.url)
    assert kind == "CheckpointNotFoundError"
    assert "org/cachde does not exist. In org there is cached." in str(message)
    assert hub.requests == []
