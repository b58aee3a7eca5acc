"""Notice that a process of another node is gone: its node died, it was killed, or the network was cut.

nccl would go on waiting for it until --dist_timeout. Every process keeps a connection to process 0, silent but for the
keepalives of the kernels: a probe every 5 seconds of silence, and an error after 40 seconds without an answer. That the
kernels beat matters: Python threads stand still while a library holds the interpreter, as one may for minutes while it
writes a large file. So a process that hangs is not noticed here, only one that is gone.
"""

import contextlib
import logging
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from general_preference.distributed import DistributedContext

logger = logging.getLogger(__name__)
EVERY, PATIENCE = 5, 40  # seconds: between probes; without an answer
GRACE = 30.0  # seconds after a process ended without a word, in which the others mostly fail with a reason of their own
BYE = b"bye"
OPTIONS = {"TCP_KEEPIDLE": EVERY, "TCP_KEEPINTVL": EVERY, "TCP_KEEPCNT": PATIENCE // EVERY}


class Heartbeat:
    """Ends this process (exit code 1, one line on stderr) when another is gone, until `close`."""

    def __init__(self, processes: "DistributedContext"):
        """Connect to process 0 at MASTER_ADDR and start watching. Collective."""
        self.rank, self.closing = processes.rank, threading.Event()
        self.peers: dict[socket.socket, int] = {}
        listening = None
        if processes.is_main:
            listening = socket.create_server(("", 0), backlog=processes.world_size + 8)
        port, token = processes.broadcast((listening and listening.getsockname()[1], secrets.token_bytes(16)))
        connected = True
        if listening is None:
            connected = self._connect(os.environ["MASTER_ADDR"], port, token)
        others = [rank for rank, here in enumerate(processes.gather_objects(connected)) if here and rank]
        if listening is not None:
            while len(self.peers) < len(others):
                peer, _ = listening.accept()
                rank = greeted(peer, token)
                if rank is None:  # a port scanner, say
                    peer.close()
                else:
                    self.peers[keep_alive(peer)] = rank
            listening.close()
            if len(others) < processes.world_size - 1:
                logger.warning(
                    "%d process(es) cannot reach port %d of process 0: should one be lost, --dist_timeout ends the run",
                    processes.world_size - 1 - len(others), port,
                )  # fmt: skip
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def _connect(self, address: str, port: int, token: bytes) -> bool:
        try:
            peer = keep_alive(socket.create_connection((address, port), timeout=EVERY))
            peer.settimeout(None)
            peer.sendall(token + struct.pack("!i", self.rank))
        except OSError:
            return False
        self.peers[peer] = 0
        return True

    def _watch(self) -> None:
        """Wait for a farewell, the news of a loss, or the end of a connection."""
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    rank, grace, news = self.peers[key.fileobj], 0.0, b""
                    try:
                        news = key.fileobj.recv(1024)
                        grace = GRACE  # an end without a farewell
                    except OSError as error:  # no answer for PATIENCE seconds, or an end that was none of its own
                        grace = 0.0 if isinstance(error, TimeoutError) else GRACE
                    selector.unregister(key.fileobj)
                    if news.startswith(BYE) or self.closing.is_set():
                        continue
                    self._leave(news.decode() or str(rank), 0.0 if news else grace)

    def _leave(self, lost: str, grace: float) -> None:
        """End this process unless it ends by itself within `grace` seconds; process 0 tells the others."""
        if self.closing.wait(grace):
            return
        for peer in self.peers if self.rank == 0 else ():
            with contextlib.suppress(OSError):
                peer.sendall(lost.encode())
        sys.stderr.write(
            f"error: process {lost} is gone (its node, the process or the network): process {self.rank} ends\n"
        )
        sys.stderr.flush()
        os._exit(1)

    def close(self) -> None:
        """Stop watching, and tell the others that this process leaves for good."""
        self.closing.set()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sendall(BYE)
                peer.shutdown(socket.SHUT_WR)


def greeted(peer: socket.socket, token: bytes) -> int | None:
    """The rank of a process of this run that has just connected; None of anybody else, within a few seconds."""
    peer.settimeout(EVERY)
    try:
        greeting = peer.recv(len(token) + 4, socket.MSG_WAITALL)
    except OSError:
        return None
    peer.settimeout(None)
    known = len(greeting) == len(token) + 4 and secrets.compare_digest(greeting[: len(token)], token)
    return struct.unpack("!i", greeting[len(token) :])[0] if known else None


def keep_alive(connection: socket.socket) -> socket.socket:
    """The same connection, whose loss its kernel notices."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in OPTIONS.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
