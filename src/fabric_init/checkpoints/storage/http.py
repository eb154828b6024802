"""Requests for parts of a file on a web server, of which no answer is believed.

A server is asked for so many bytes from so far on, and only those are taken: an answer that is for other bytes, is
compressed, is longer, or is of another version of the file is refused, as soon as that can be seen. Redirects are
followed, as the Hub of models needs, but not to plain http and not into this machine or its network.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from fabric_init.errors import CheckpointFormatError

_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_BUSY = (408, 425, 429, 500, 502, 503, 504)
SECONDS_TO_NEXT_TRY = (0.1, 0.4, 1.6)
"""How long to wait after each request that has failed."""
_SECONDS_TO_CONNECT, _SECONDS_WITHOUT_DATA = 30.0, 60.0


class Version(NamedTuple):
    """What a server says of a file, which has to hold between requests; empty where it does not say it."""

    size: int
    etag: str
    modified: str


class WrongAnswerError(Exception):
    """A server has answered with something else than it was asked for."""


class _BusyError(WrongAnswerError):
    """It cannot answer now."""


class NoRangesError(WrongAnswerError):
    """It answers with the whole file."""


class ChangedError(WrongAnswerError):
    """It has another version of the file by now."""


class HTTPFile:
    """One file on a web server.

    Args:
        filesystem: fsspec's, whose session and options are used. Its ``client_kwargs`` may have a ``timeout``
            (``aiohttp.ClientTimeout``, for connecting, reading and the whole), in place of ours.
        url: Where it is.
    """

    def __init__(self, filesystem: Any, url: str) -> None:
        self._filesystem = filesystem
        self._url = url
        self.version: Version | None = None

    def open(self) -> Version:
        """Ask what the file is, by its first byte.

        Raises:
            WrongAnswerError: the server does not answer requests for parts.
        """
        self.fetch([(0, 1)])
        assert self.version is not None
        return self.version

    def fetch(self, ranges: Sequence[tuple[int, int]], buffer: bytearray | None = None) -> list[memoryview]:
        """Return these byte ranges, requested at once.

        Args:
            ranges: the first byte, and the one after the last.
            buffer: memory for the answer, if there is one range.

        Raises:
            WrongAnswerError: an answer is not for what was asked, or of another version.
        """
        from fsspec.asyn import sync

        async def all_of_them() -> list[memoryview]:
            return list(await asyncio.gather(*(self._part(start, stop, buffer) for start, stop in ranges)))

        found: list[memoryview] = sync(self._filesystem.loop, all_of_them)
        return found

    async def _part(self, start: int, stop: int, buffer: bytearray | None) -> memoryview:
        """Return bytes of the file; once it is open, a request that fails is sent again after a while."""
        from aiohttp import ClientError

        target = memoryview(bytearray(stop - start) if buffer is None else buffer)[: stop - start]
        for pause in SECONDS_TO_NEXT_TRY if self.version is not None else ():
            try:
                return await self._request(start, stop, target)
            except (ClientError, asyncio.TimeoutError, _BusyError):
                await asyncio.sleep(pause)
        return await self._request(start, stop, target)

    async def _request(self, start: int, stop: int, target: memoryview) -> memoryview:
        from aiohttp import ClientTimeout

        session = await self._filesystem.set_session()
        options: dict[str, Any] = dict(self._filesystem.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if "timeout" not in self._filesystem.client_kwargs:
            connect, read = _SECONDS_TO_CONNECT, _SECONDS_WITHOUT_DATA
            options.setdefault("timeout", ClientTimeout(total=None, connect=connect, sock_read=read))
        url = self._url
        for _ in range(_REDIRECTS):
            request = session.get(self._filesystem.encode_url(url), headers=headers, allow_redirects=False, **options)
            async with request as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    url = _redirected(url, answer.headers.get("Location", ""))
                    continue
                return await self._taken(answer, start, stop, target)
        raise WrongAnswerError(f"more than {_REDIRECTS} redirects")

    async def _taken(self, answer: Any, start: int, stop: int, target: memoryview) -> memoryview:
        if answer.status in (404, 410):
            raise FileNotFoundError(self._url)
        if answer.status == 200:
            raise NoRangesError
        if answer.status != 206:
            kind = _BusyError if answer.status in _BUSY else WrongAnswerError
            raise kind(f"the server answers {answer.status} {answer.reason}")
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise WrongAnswerError(f"the answer is compressed ({encoding[:20]}), although that was not asked for")
        said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if said is None or int(said[1]) != start:
            raise WrongAnswerError(f"the answer is not for the bytes from {start:,} on, but for other ones")
        version = Version(int(said[3]), answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", ""))
        if self.version is None:
            self.version = version
        if version != self.version:
            raise ChangedError
        if int(said[2]) != stop - 1:
            raise WrongAnswerError(f"the answer is for {int(said[2]) + 1 - start:,} bytes, not {stop - start:,}")
        at = 0
        while part := await answer.content.readany():  # what has arrived: no copy into larger parts
            if at + len(part) > len(target):
                raise WrongAnswerError(f"the answer is longer than the {stop - start:,} bytes that were asked for")
            target[at : at + len(part)] = part
            at += len(part)
        return target[:at]


def _redirected(url: str, to: str) -> str:
    """Return where a redirect leads, if that is no worse than where it comes from."""
    target = urljoin(url, to)
    before, after = urlsplit(url), urlsplit(target)
    if after.scheme not in ("http", "https") or (before.scheme == "https" and after.scheme == "http"):
        raise WrongAnswerError(f"the server redirects to {after.scheme or 'nothing'}://, which is refused as unsafe")
    if after.hostname != before.hostname and _is_inside(after.hostname or "") and not _is_inside(before.hostname or ""):
        raise WrongAnswerError(f"the server redirects to {after.hostname}, which is refused as unsafe")
    return target


def _is_inside(host: str) -> bool:
    """Return whether ``host`` is this machine, or an address of its own network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".internal", ".local")) or "." not in host
    return not address.is_global


def outside(name: str) -> bool:
    """Return whether a file name in an index would mean another place at a URL than below the index's folder."""
    return any(sign in name for sign in ("%", "\\", "?", "#", "://", "::")) or name.startswith(("/", "~"))


def explained(path: object, error: WrongAnswerError, size: int) -> CheckpointFormatError:
    """Return the error of a reader for a wrong answer."""
    if isinstance(error, NoRangesError):
        return CheckpointFormatError(
            f"{path}: the server does not answer requests for a part of a file, so a region of a tensor cannot be read "
            "from it. Download the file and open the copy."
        )
    if isinstance(error, ChangedError):
        return CheckpointFormatError(
            f"{path} changed after it was opened (it held {size:,} bytes then): the server has another version of it."
        )
    return CheckpointFormatError(f"{path} cannot be read: {error}.")
