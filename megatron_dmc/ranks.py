"""Ranks that serve together: where they meet, and how they hear that one of them has died."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading

import torch

_ORDERLY = b"."


def meeting_host() -> str | None:
    """Where sockets between ranks listen: loopback where all are on one machine, else `None` for the host's name."""
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")
    return "127.0.0.1" if alone else None


class Lifeline:
    """A connection from every rank to rank 0, for as long as they live.

    A rank that has died leaves the others waiting for ever, in a collective. Here rank 0 learns of it (`lost`), and the
    other ranks end with rank 0. Every rank constructs this, at the same time.
    """

    def __init__(self) -> None:
        self._lost: int | None = None
        self._ending = False
        self._connections: dict[socket.socket, int] = {}
        self._rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if world == 1:
            return
        host = meeting_host() or socket.gethostname()
        listener = socket.create_server((host, 0), backlog=world) if self._rank == 0 else None
        address = [listener.getsockname()[:2] if listener else None]
        torch.distributed.broadcast_object_list(address, src=0)
        if listener:
            with listener:
                for _ in range(world - 1):
                    connection = listener.accept()[0]
                    (rank,) = struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))
                    self._connections[connection] = rank
        else:
            connection = socket.create_connection(tuple(address[0]))
            connection.sendall(struct.pack("!i", self._rank))
            self._connections[connection] = 0
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def lost(self) -> int | None:
        """Rank 0: a rank that has died."""
        return self._lost

    def end(self) -> None:
        """Rank 0: from here on the others may go in their own time, as it does itself."""
        self._ending = True
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it was quicker
                connection.sendall(_ORDERLY)

    def _watch(self) -> None:
        connections = list(self._connections)
        ready, _, _ = select.select(connections, [], [])
        try:
            said = ready[0].recv(1)
        except OSError:
            said = b""
        if said == _ORDERLY or self._ending:
            return
        self._lost = self._connections[ready[0]]
        if self._rank:
            print(f"megatron-dmc serve: rank 0 has ended, and with it rank {self._rank}", file=sys.stderr, flush=True)
            os._exit(1)
