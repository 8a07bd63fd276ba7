"""Three messages more between client, coordinator and engine: CANCEL, TOKENS, STATE. Adapted from megatron-core 0.19.2.

There, a client hears of a request when it has ended, and cannot give it up. Here

- CANCEL goes from the client by way of the coordinator to the engine that has the request, and there to every rank of
  the model-parallel group, which gives the request up between two steps (`DMCInferenceEngine.cancel`);
- TOKENS goes from the engine by way of the coordinator to the client, after each step: what the requests that asked
  for it (`stream_request`) have generated since the last one. What is left comes with the reply at their end;
- STATE goes from every engine to every client, twice a second: numbers of the engine, by data-parallel rank.

The engine's side is `ServingEngine`. Megatron's coordinator is a process of its own, started by the engine;
`ServingCoordinator` stands in its place, so that the new process imports this module, which enters the messages into
its tables.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from enum import IntEnum
from typing import Any

import msgpack
import zmq
from megatron.core.inference import headers
from megatron.core.inference.data_parallel_inference_coordinator.coordinator import DataParallelInferenceCoordinator
from megatron.core.inference.data_parallel_inference_coordinator.handlers import HANDLERS, message_handler
from megatron.core.inference.headers import Headers
from megatron.core.inference.inference_client import InferenceClient
from megatron.core.inference.inference_request import DynamicInferenceRequest, Status
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import trace_async_exceptions

from megatron_dmc.engine import failure
from megatron_dmc.openai_answers import Tokens
from megatron_dmc.openai_requests import RequestFailed

logger = logging.getLogger(__name__)


class Serving(IntEnum):
    """The messages that Megatron does not have, in a range of their own."""

    CANCEL = 100
    TOKENS = 101
    STATE = 102


for member in Serving:
    headers._CODE_TO_MEMBER[member.value] = member
    headers._NAME_TO_MEMBER[member.name] = member


def pack(header: IntEnum, *rest: Any) -> bytes:
    return msgpack.packb([header.value, *rest], use_bin_type=True)


# In the coordinator.


@message_handler(Serving.CANCEL)
def handle_cancel(coordinator, sender_identity, payload) -> None:
    """Pass a client's cancellation on to the engine that has the request, unless it has ended."""
    client_request = payload[1]
    for request_id, known_as in coordinator.request_id_to_client_request_id.items():
        if known_as == client_request and coordinator.request_id_to_client_id[request_id] == sender_identity:
            coordinator._send_to_engine(coordinator.request_id_to_rank[request_id], pack(Serving.CANCEL, request_id))
            return


@message_handler(Serving.TOKENS)
def handle_tokens(coordinator, sender_identity, payload) -> None:
    """Pass an engine's new tokens on, one message for each client."""
    of_clients = defaultdict(list)
    for request_id, *new in payload[1]:
        client_request = coordinator.request_id_to_client_request_id[request_id]
        of_clients[coordinator.request_id_to_client_id[request_id]].append([client_request, *new])
    for client, news in of_clients.items():
        coordinator.router_socket.send_multipart([client, pack(Serving.TOKENS, news)])


@message_handler(Serving.STATE)
def handle_state(coordinator, sender_identity, payload) -> None:
    """Pass an engine's numbers on to all clients."""
    for client in list(coordinator.known_clients):
        coordinator.router_socket.send_multipart([client, pack(Serving.STATE, sender_identity, payload[1])])


_ENGINE = b"mp-coord-"
"""How the names of engines begin at the coordinator."""


_FROM_ENGINES = (Headers.ENGINE_REPLY, Headers.DISCONNECT, Serving.TOKENS, Serving.STATE)


def understood(sender: bytes, parts: list[bytes]) -> bool:
    """Whether a message to the coordinator is one that its handlers take."""
    if len(parts) != 1:
        return False
    if parts[0] == b"":  # an engine's first message
        return sender.startswith(_ENGINE)
    try:
        header, *rest = msgpack.unpackb(parts[0], raw=False)
        handled = Headers(header) in HANDLERS
    except Exception:  # of msgpack and of what is no list: whatever bytes a stranger may have sent
        return False
    if header == Headers.SUBMIT_REQUEST:
        kinds = [int, (str, list), dict]
        handled = len(rest) == 3 and all(map(isinstance, rest, kinds))
    elif header == Serving.CANCEL:
        handled = len(rest) == 1 and isinstance(rest[0], int)
    return handled and sender.startswith(_ENGINE) == (header in _FROM_ENGINES)


class _Router:
    """The coordinator's socket.

    What is meant for a client that has gone, and what the coordinator does not understand, is dropped: either would end
    it.
    """

    def __init__(self, socket: zmq.Socket, clients: set[bytes]) -> None:
        self._socket, self._clients = socket, clients

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv_multipart(self) -> list[bytes]:
        while True:
            sender, *parts = self._socket.recv_multipart()
            if understood(sender, parts):
                return [sender, *parts]
            logger.warning("a message that is not understood came from %s; it is ignored", sender)

    def send_multipart(self, message: list[bytes]) -> None:
        try:
            self._socket.send_multipart(message)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH or message[0].startswith(_ENGINE):
                raise
            self._clients.discard(message[0])


class ServingCoordinator(DataParallelInferenceCoordinator):
    """Megatron's coordinator with the messages of this module; it lives as long as the process that started it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.router_socket = _Router(self.router_socket, self.known_clients)

    @classmethod
    def entrypoint(cls, *args, **kwargs) -> None:
        # A signal for the whole process group means the server, which lets running requests finish.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().entrypoint(*args, **kwargs)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# In the client.


class StreamingClient(InferenceClient):
    """Megatron's client, which also hears of tokens as they are generated, and can cancel.

    Attributes:
        states: by data-parallel rank, the numbers that its engine last told (`ServingEngine.numbers`).
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.states: dict[bytes, dict[str, float]] = {}
        self._listeners: dict[int, Callable[[list, list, list], Any]] = {}

    def stream_request(
        self, prompt: str | list[int], sampling_params: SamplingParams, listener: Callable[[list, list, list], Any]
    ) -> tuple[int, asyncio.Future]:
        """As `add_request`, and `listener` is called with tokens as they come.

        Args:
            prompt, sampling_params: see `add_request`.
            listener: called with new tokens, their log-probabilities and, by token, those of likely tokens, the latter
                two empty where the parameters do not ask for them. The last tokens are only in the reply.

        Returns:
            the request's number, for `cancel`, and the future of its reply.
        """
        sampling_params = copy.copy(sampling_params)  # the caller's own stay as they are
        sampling_params.add_attributes({"stream": True})
        request_id = self.next_request_id
        future = self.add_request(prompt, sampling_params)
        self._listeners[request_id] = listener
        return request_id, future

    def cancel(self, request_id: int) -> None:
        """Give a request up; without effect on one that has ended. Its reply holds what was generated."""
        self._send_signal_to_engines(Serving.CANCEL, request_id)

    async def stream(self, prompt: str | list[int], sampling_params: SamplingParams) -> AsyncIterator[Tokens]:
        """Generate, and yield what each step brought; closing the generator cancels the request.

        Raises:
            RequestFailed: where the engine cannot serve it.
        """
        arrived: asyncio.Queue = asyncio.Queue()
        request_id, reply = self.stream_request(prompt, sampling_params, lambda *new: arrived.put_nowait(Tokens(*new)))
        reply.add_done_callback(arrived.put_nowait)
        sent, ended = 0, False
        try:
            while not ended:
                item = await arrived.get()
                if ended := not isinstance(item, Tokens):
                    item = _rest(item.result(), sent)
                sent += len(item.tokens)
                if item.tokens:
                    yield item
        finally:
            if not ended:
                self.cancel(request_id)

    @trace_async_exceptions
    async def _recv_task(self) -> None:
        while True:
            try:
                header, *rest = msgpack.unpackb(self.socket.recv(flags=zmq.NOBLOCK), raw=False)
            except zmq.Again:
                await asyncio.sleep(0.001 if self.completion_futures else 0.01)
                continue
            if header == Serving.TOKENS:
                for request_id, *new in rest[0]:
                    if (listener := self._listeners.get(request_id)) is not None:
                        listener(*new)
            elif header == Serving.STATE:
                self.states[rest[0]] = rest[1]
            elif header == Headers.ENGINE_REPLY:
                request_id, reply = rest
                self._listeners.pop(request_id, None)
                reply["latency"] = time.perf_counter() - self.request_submission_times.pop(request_id)
                future = self.completion_futures.pop(request_id)
                if not future.done():
                    future.set_result(DynamicInferenceRequest.deserialize(reply) if self.deserialize else reply)


def _rest(request: DynamicInferenceRequest, sent: int) -> Tokens:
    """What an ended request has beyond the tokens that came before."""
    if request.status == Status.FAILED:
        raise RequestFailed(failure(request))
    values = (request.generated_tokens, request.generated_log_probs, request.generated_top_n_logprobs)
    return Tokens(*((found or [])[sent:] for found in values))
