"""A connection from every rank to rank 0, which closes when the process at its end is gone: deaths on other nodes.

Nothing is sent while all is well. The kernel closes a killed process's connections and answers keepalives for a busy
one, so that neither side has to run for the other to know. Rank 0 hands on what a rank says; its own death all see.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from typing import Any

from megalign.liveness.reason import Reason

_BYE = "bye"
# A node without power answers nothing: known after 10 + 4 * 5 seconds.
_GREETING = 10.0  # seconds in which whoever connects must say the job's word
_LONGEST_GREETING = 256  # bytes
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Star:
    """This rank's end: rank 0's has all connections, another's one."""

    def __init__(self, rank: int, store: Any, number: int = 0) -> None:
        """`number` tells one star of a store from the next."""
        self.rank, self._key = rank, f"megalign/liveness/{number}"
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._names: dict[socket.socket, int | None] = {}  # whose it is, once it has said so
        self._unread: dict[socket.socket, str | None] = {}
        self._came: dict[socket.socket, float] = {}
        self._listener: socket.socket | None = None
        if rank == 0:
            self._listen(store)
        else:
            self._connect(store)
        # A child that outlives this process would keep the connections open.
        os.register_at_fork(after_in_child=self._drop)

    def _listen(self, store: Any) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._token = secrets.token_hex(16)
        store.set(self._key, f"{_own_address()} {self._listener.getsockname()[1]} {self._token}")

    def _connect(self, store: Any) -> None:
        address, port, token = store.get(self._key).decode().split()
        connection = socket.create_connection((address, int(port)), timeout=20)
        self._take(connection, 0)
        self._send(connection, f"{token} {self.rank}")

    def poll(self, seconds: float) -> tuple[list[int], Reason | None]:
        """Waits for news at most this long: the ranks that died, and why all must leave, if somebody says so."""
        died: list[int] = []
        reason = None
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._bell:
                self._bell.recv(1)
                continue
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):  # whoever it was has hung up
                    self._take(self._listener.accept()[0], None)
                continue
            for line in self._lines(key.fileobj):
                if key.fileobj not in self._names:
                    break
                if line == _BYE:
                    self._close(key.fileobj)
                elif self._names[key.fileobj] is None:
                    self._greet(key.fileobj, line)
                else:
                    reason = reason or Reason.of_line(line)
            if key.fileobj in self._names and self._unread[key.fileobj] is None:
                name = self._names[key.fileobj]
                self._close(key.fileobj)
                died += [] if name is None else [name]
        self._drop_strangers()
        return died, reason

    def wake(self) -> None:
        """Ends a `poll` of another thread; `poll` and `leave` belong to one."""
        with contextlib.suppress(OSError):  # the other thread has left already
            self._rope.send(b".")

    def say(self, reason: Reason) -> None:
        """All who are connected shall leave."""
        for connection in list(self._names):
            self._send(connection, reason.to_line())

    def leave(self) -> None:
        """This rank's end is no death."""
        for connection in list(self._names):
            self._send(connection, _BYE)
        self._drop()

    def _greet(self, connection: socket.socket, line: str) -> None:
        """Somebody who does not know the job's word is no rank of it."""
        token, _, rank = line.partition(" ")
        if secrets.compare_digest(token.encode(), self._token.encode()) and rank.isdigit():
            self._names[connection] = int(rank)
        else:
            self._close(connection)

    def _drop_strangers(self) -> None:
        """Who has connected and does not greet: the port is open to all, and to those that scan for open ones."""
        late = time.monotonic() - _GREETING
        for connection in [connection for connection, name in self._names.items() if name is None]:
            if self._came[connection] < late or len(self._unread[connection]) > _LONGEST_GREETING:
                self._close(connection)

    def _take(self, connection: socket.socket, name: int | None) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.settimeout(5)
        self._names[connection], self._unread[connection] = name, ""
        self._came[connection] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ)

    def _lines(self, connection: socket.socket) -> list[str]:
        """Whole lines that have come; what is unread becomes None at the connection's end."""
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._unread[connection] = None
            return []
        *lines, self._unread[connection] = (self._unread[connection] + data.decode(errors="replace")).split("\n")
        return lines

    def _send(self, connection: socket.socket, line: str) -> None:
        try:
            connection.sendall(f"{line}\n".encode())
        except OSError:  # gone; whoever reads its end will tell
            return

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._names[connection], self._unread[connection], self._came[connection]
        connection.close()

    def _drop(self) -> None:
        for connection in (*self._names, self._bell, self._rope):
            connection.close()
        if self._listener is not None:
            self._listener.close()
        self._names, self._unread, self._listener = {}, {}, None


def _own_address() -> str:
    """By which the others reach this process: MASTER_ADDR where it is this node's, which they all know."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    found = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)
    family, kind, _, _, place = found[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        own = probe.getsockname()[0]
    return master if own == place[0] or own.startswith("127.") or own == "::1" else own
