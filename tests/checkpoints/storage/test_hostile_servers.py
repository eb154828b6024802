"""Servers that answer with something else than they were asked for, and files that change between two requests."""

from __future__ import annotations

import gzip
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save, save_file

from fabric_init.checkpoints import open_checkpoint
from fabric_init.checkpoints.storage.http import WrongAnswerError, _redirected
from fabric_init.errors import CheckpointFormatError
from tests.support.web_server import Server, serving

STATE = {f"k{number}": torch.full((1000,), float(number)) for number in range(5)}
Headers = dict[str, str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    save_file(STATE, tmp_path / "model.safetensors")
    with serving(tmp_path) as state:
        yield state


def _other_bytes(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {**headers, "Content-Range": headers["Content-Range"].replace("bytes ", "bytes 1")}, content


def _no_range(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {**headers, "Content-Range": "bytes */*"}, content


def _too_long(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return headers, content + bytes(1 << 24)


def _too_short(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return headers, content[:-1]


def _compressed(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {**headers, "Content-Encoding": "gzip"}, gzip.compress(bytes(1 << 28), 1)


def _changed(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {**headers, "ETag": '"another"'}, content


def _changed_later(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {**headers, "Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}, content


def _grown(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {**headers, "Content-Range": headers["Content-Range"] + "0"}, content


def _elsewhere(headers: Headers, content: bytes) -> tuple[Headers, bytes]:
    return {"Location": "ftp://127.0.0.1/model.safetensors"}, b""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_bytes, "the answer is not for the bytes from"),
        (_no_range, "the answer is not for the bytes from"),
        (_too_long, "longer than the 4,000 bytes that were asked for"),
        (_too_short, "answered with 3,999 bytes for 4,000"),
        (_compressed, r"the answer is compressed \(gzip\)"),
        (_changed, "changed after it was opened"),
        (_changed_later, "changed after it was opened"),
        (_grown, "changed after it was opened"),
        (_elsewhere, "redirects to ftp://, which is refused as unsafe"),
    ],
)
def test_an_answer_to_another_question_is_refused_without_taking_it_into_memory(
    server: Server, spoil: Callable[[Headers, bytes], tuple[Headers, bytes]], message: str
) -> None:
    reader = open_checkpoint(f"{server.url}/model.safetensors")
    assert torch.equal(reader.read("k1"), STATE["k1"])
    server.spoils = spoil
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointFormatError, match=message):
        reader.read("k3")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; the gzip would unpack to 268,000


def test_a_file_in_fsspecs_memory_that_is_written_anew_is_seen() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/changing/model.safetensors", save(STATE))
    reader = open_checkpoint("memory://changing/model.safetensors")
    assert torch.equal(reader.read("k1"), STATE["k1"])
    filesystem.pipe("/changing/model.safetensors", save({key: value + 1 for key, value in STATE.items()}))
    with pytest.raises(CheckpointFormatError, match="changed after it was opened"):
        reader.read("k2")


@pytest.mark.parametrize(
    "name",
    ["%2e%2e/model.safetensors", "a%2Fb.safetensors", "http://127.0.0.1/x.safetensors", "x.safetensors?a=b", "..\\x"],
)
def test_an_index_at_a_url_does_not_leave_its_folder(server: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"k1": name}}))
    with pytest.raises(CheckpointFormatError, match="refused as unsafe"):
        open_checkpoint(f"{server.url}/model.safetensors.index.json")
    assert all(request.endswith("index.json") for request in server.requests)


@pytest.mark.parametrize("to", ["http://hub.example/x", "//127.0.0.1/x", "https://10.0.0.1/x", "https://localhost/x"])
def test_a_redirect_leads_neither_to_plain_http_nor_into_this_network(to: str) -> None:
    with pytest.raises(WrongAnswerError, match="refused as unsafe"):
        _redirected("https://hub.example/org/model/x", to)


def test_a_redirect_to_another_host_is_followed_as_the_hub_needs_it() -> None:
    assert _redirected("https://hub.example/a/x", "https://cdn.example/y") == "https://cdn.example/y"
    assert _redirected("https://hub.example/a/x", "../b/y") == "https://hub.example/b/y"
