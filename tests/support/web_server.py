"""A web server on this machine that counts what it sends: with ranges or without, and as the Hub of models."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Server:
    """What is served, and what was asked for."""

    folder: Path
    ranges: bool = True
    url: str = ""
    sent: int = 0
    """Bytes of content sent."""
    spoils: Callable[[dict[str, str], bytes], tuple[dict[str, str], bytes]] | None = None
    """Makes another answer of the headers and the content of each answer to a request for a part."""
    busy: int = 0
    """How many of the next requests to refuse as a server does that has too many."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request, as they came."""

    def reset(self) -> None:
        self.sent = 0
        self.requests.clear()


@contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[Server]:
    """Serve a folder: ``/NAME`` for plain files, ``/ORG/MODEL/resolve/REVISION/NAME`` as the Hub does."""
    state = Server(folder, ranges)
    counting = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_content=False)

        def do_GET(self) -> None:
            self.answer(with_content=True)

        def answer(self, *, with_content: bool) -> None:
            path = self.path.partition("?")[0]
            state.requests.append(f"{self.command} {path}")
            if state.busy:
                with counting:
                    state.busy -= 1
                self.send(503, b"", {}, with_content)
                return
            if listing := re.fullmatch(r"/api/models/(\w+)/(\w+)/revision/(\w+)", path):
                names = sorted(one.name for one in state.folder.iterdir())
                model = f"{listing[1]}/{listing[2]}"
                content = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, with_content)
                return
            resolved = re.fullmatch(r"/\w+/\w+/resolve/\w+/(.+)", path)
            file = state.folder / (resolved[1] if resolved else path.lstrip("/"))
            if not file.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_content)
                return
            found = file.stat()
            size = found.st_size
            headers = {"ETag": f'"{found.st_mtime_ns:x}-{size:x}"', "X-Repo-Commit": COMMIT}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if state.ranges and asked else (0, size - 1)
            if state.ranges and asked:
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            with file.open("rb") as opened:
                opened.seek(first)
                content = opened.read(max(0, last + 1 - first))
            if state.spoils is not None and "Content-Range" in headers:
                headers, content = state.spoils(headers, content)
            if "Location" in headers:
                self.send(302, b"", headers, with_content)
                return
            self.send(206 if "Content-Range" in headers else 200, content, headers, with_content)

        def send(self, status: int, content: bytes, headers: dict[str, str], with_content: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_content:
                with counting:  # before it is sent: the client may look as soon as it has it
                    state.sent += len(content)
                try:
                    self.wfile.write(content)
                except OSError:  # the client had enough
                    self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
