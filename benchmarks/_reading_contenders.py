"""Read one safetensors file: ``python _reading_contenders.py CONTENDER FILE PORT`` prints the seconds until ready, and
until one byte of every page has been touched."""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fabric_init import deferred_init, materialize

PIECE_BYTES = 8 << 20
Contender = Callable[[str, str, nn.Module], Sequence[Tensor]]


def recorded(path: str) -> nn.Module:
    """Return a recorded model with the tensors of the file."""
    with safe_open(path, "pt") as file, deferred_init():
        model = nn.Module()
        for key in file.keys():
            values = torch.empty(file.get_slice(key).get_shape(), dtype=torch.bfloat16)
            model.register_parameter(key, nn.Parameter(values, requires_grad=False))
    return model


def in_threads(count: int, size: int, connect: Callable[[], Callable[[memoryview, int], None]]) -> list[Tensor]:
    """Read pieces of a file, each thread the next one, into memory of their own."""
    pieces = [torch.empty(min(PIECE_BYTES, size - at), dtype=torch.uint8) for at in range(0, size, PIECE_BYTES)]
    waiting, lock = iter(enumerate(pieces)), threading.Lock()

    def work() -> None:
        read = connect()
        while True:
            with lock:
                number, piece = next(waiting, (-1, None))
            if piece is None:
                return
            read(memoryview(piece.numpy()), number * PIECE_BYTES)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return pieces


def local_threads(count: int) -> Contender:
    def run(path: str, url: str, model: nn.Module) -> list[Tensor]:
        descriptor = os.open(path, os.O_RDONLY)

        def read(target: memoryview, at: int) -> None:
            while target:
                got = os.preadv(descriptor, [target], at)
                target, at = target[got:], at + got

        return in_threads(count, os.path.getsize(path), lambda: read)

    return run


def connections(path: str, url: str, model: nn.Module) -> list[Tensor]:
    def connect() -> Callable[[memoryview, int], None]:
        connection = http.client.HTTPConnection(url.split("/")[2])

        def read(target: memoryview, at: int) -> None:
            connection.request("GET", "/m.safetensors", headers={"Range": f"bytes={at}-{at + len(target) - 1}"})
            answer = connection.getresponse()
            while target:
                target = target[answer.readinto(target) :]
            answer.read()

        return read

    return in_threads(16, os.path.getsize(path), connect)


def ours(*, mmap: bool, remote: bool = False) -> Contender:
    def run(path: str, url: str, model: nn.Module) -> list[Tensor]:
        materialize(model, checkpoint=url if remote else path, mmap=mmap)
        return list(model.parameters())

    return run


CONTENDERS: dict[str, Contender] = {
    "one_thread": local_threads(1),
    "four_threads": local_threads(4),
    "load_file": lambda path, url, model: list(load_file(path).values()),
    "ours_mapped": ours(mmap=True),
    "ours_copied": ours(mmap=False),
    "connections": connections,
    "ours_url": ours(mmap=True, remote=True),
}


def main() -> None:
    name, path, port = sys.argv[1:]
    model = recorded(path)
    url = f"http://127.0.0.1:{port}/m.safetensors"
    begun = time.perf_counter()
    tensors = CONTENDERS[name](path, url, model)
    ready = time.perf_counter()
    for tensor in tensors:
        tensor.detach().view(torch.uint8).flatten()[:: os.sysconf("SC_PAGE_SIZE")].sum()
    print(ready - begun, time.perf_counter() - begun)


if __name__ == "__main__":
    main()
