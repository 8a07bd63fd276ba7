"""Ranks that serve together: where they meet, and how they hear that one of them has died."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import sys
import threading
from pathlib import Path

import torch

from megatron_dmc.config import DMCError

MEETING_SECONDS = 120
"""In which ranks must have found each other."""

_ORDERLY = b"."


def meeting_host() -> str:
    """Where this rank listens for others. Every rank calls this, at the same time.

    Loopback where all share one. Else, on rank 0's machine, the address that MASTER_ADDR, its name, has on another one
    (on its own, a machine's name often means its loopback); and on the others, the address they reach it from.

    Raises:
        DMCError: where MASTER_ADDR has no IPv4 address.
    """
    name, address = os.environ.get("MASTER_ADDR", ""), None
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (_loopback(), address))
    elsewhere = [address for loopback, address in found if loopback != found[0][0]]
    if not elsewhere:
        return "127.0.0.1"
    if elsewhere[0] is None:
        raise DMCError(f"MASTER_ADDR must be the name or the IPv4 address of rank 0's machine; got {name!r}")
    if _loopback() == found[0][0]:
        return elsewhere[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((elsewhere[0], 9))  # sends nothing
        return probe.getsockname()[0]


def _loopback() -> tuple[str, int]:
    """What those processes have in common whose loopback is the same: a machine since its start, and its network."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/net").st_ino


def _watched(connection: socket.socket) -> None:
    """From here on it may stay silent, and the system finds out within a minute where the other machine has gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Lifeline:
    """A connection from every rank to rank 0, for as long as they live.

    A rank that has died leaves the others waiting for ever, in a collective. Here rank 0 learns of it (`lost`), and the
    other ranks end with rank 0. Every rank constructs this, at the same time.

    Args:
        host: where this rank listens, see `meeting_host`.

    Raises:
        DMCError: if they do not find each other.
    """

    def __init__(self, host: str) -> None:
        self._lost: int | None = None
        self._ending = False
        self._connections: dict[socket.socket, int] = {}
        self._rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if world == 1:
            return
        listener = socket.create_server((host, 0), backlog=world) if self._rank == 0 else None
        secret = [(listener.getsockname()[:2], secrets.token_bytes(16)) if listener else None]
        torch.distributed.broadcast_object_list(secret, src=0)
        address, password = secret[0]
        try:
            if listener:
                with listener:
                    self._accept(listener, password, world)
            else:
                connection = socket.create_connection(address, timeout=MEETING_SECONDS)
                connection.sendall(password + struct.pack("!i", self._rank))
                self._connections[connection] = 0
        except OSError as error:
            raise DMCError(
                f"rank {self._rank} does not meet the others at {address[0]}:{address[1]}: {error.strerror or error}; "
                "ranks must reach rank 0's machine at this address"
            ) from error
        for connection in self._connections:
            _watched(connection)
        threading.Thread(target=self._watch, daemon=True).start()

    def _accept(self, listener: socket.socket, password: bytes, world: int) -> None:
        """A connection from each of the other ranks; nobody else knows the password."""
        listener.settimeout(MEETING_SECONDS)
        while len(self._connections) < world - 1:
            connection = listener.accept()[0]
            connection.settimeout(5)
            said = b""
            with contextlib.suppress(OSError):
                said = connection.recv(len(password) + 4, socket.MSG_WAITALL)
            if len(said) == len(password) + 4 and hmac.compare_digest(said[: len(password)], password):
                (self._connections[connection],) = struct.unpack("!i", said[len(password) :])
            else:
                connection.close()

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
