"""Learn that another process has ended, without its help.

[Note: lifelines]
Each rank has a socket that listens and never accepts. The kernel completes the connection of another rank to it, and
resets it when the process ends, however it does: no thread, no heartbeat, and a constructor that holds the interpreter
for minutes is not taken for dead. Each rank watches the next one alone, so a group of any size costs two descriptors
a rank. A rank that cannot have a socket is waited for until the time is over.
"""

from __future__ import annotations

import os
import socket

_listening: tuple[int, tuple[str, int]] | None = None
"""A descriptor, which the kernel closes when the process has ended, and its address."""


def address_here(store_host: str | None, store_port: int) -> tuple[str, int] | None:
    """Return the address at which this process listens while it lives; ``None`` if it cannot.

    Args:
        store_host: The machine of the store, if it is one that ranks reach over the network.
        store_port: Its port.
    """
    global _listening
    try:
        if _listening is None:
            host = "127.0.0.1" if store_host is None else _own_address(store_host, store_port)
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
                listening.bind((host, 0))
                listening.listen(8)
                name = listening.getsockname()
                _listening = listening.detach(), (str(name[0]), int(name[1]))
            os.register_at_fork(after_in_child=_not_in_children)
        return _listening[1]
    except OSError:  # out of descriptors, say
        return None


def _own_address(host: str, port: int) -> str:
    """Return the address of this machine from which it reaches another; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _not_in_children() -> None:
    global _listening
    if _listening is not None:  # a child that lives longer must not pass for its parent
        socket.close(_listening[0])
        _listening = None


class Lifeline:
    """A connection to another process that lasts as long as that one lives.

    Args:
        address: Where it listens, as its :func:`address_here` said.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection: socket.socket | None = None
        self._was_refused = False
        try:
            self._connection = socket.create_connection(address, timeout=1.0)
            self._connection.setblocking(False)
        except ConnectionRefusedError:  # a firewall may do that, but none that is in this machine
            self._was_refused = _listening is not None and _listening[1][0] == address[0]
        except OSError:  # out of reach, or out of descriptors: nothing is known then
            pass

    def is_cut(self) -> bool:
        """Return whether the other process has ended; ``False`` if that is not known."""
        if self._connection is None:
            return self._was_refused
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Watch no longer."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
