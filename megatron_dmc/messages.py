"""Two messages more between client, coordinator and engine: CANCEL and TOKENS. Adapted from megatron-core 0.19.2.

There, a client hears of a request when it has ended, and cannot give it up. Here

- CANCEL goes from the client by way of the coordinator to the engine that has the request, and there to every rank of
  the model-parallel group, which gives the request up between two steps (`DMCInferenceEngine.cancel`);
- TOKENS goes from the engine by way of the coordinator to the client, after each step: what the requests that asked
  for it (`stream_request`) have generated since the last one. What is left comes with the reply at their end.

Megatron's coordinator is a process of its own, started by the engine. `ServingCoordinator` stands in its place, so that
the new process imports this module, which enters the messages into its tables.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any
from unittest import mock

import msgpack
import zmq
from megatron.core.inference import headers
from megatron.core.inference.data_parallel_inference_coordinator.coordinator import DataParallelInferenceCoordinator
from megatron.core.inference.data_parallel_inference_coordinator.handlers import message_handler
from megatron.core.inference.engines import dynamic_engine
from megatron.core.inference.headers import Headers
from megatron.core.inference.inference_client import InferenceClient
from megatron.core.inference.inference_request import DynamicInferenceRequest, DynamicInferenceRequestRecord
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import trace_async_exceptions

from megatron_dmc.engine import DMCInferenceEngine


class Serving(IntEnum):
    """The messages that Megatron does not have, in a range of their own."""

    CANCEL = 100
    TOKENS = 101


for member in Serving:
    headers._CODE_TO_MEMBER[member.value] = member
    headers._NAME_TO_MEMBER[member.name] = member


def _pack(header: IntEnum, *rest: Any) -> bytes:
    return msgpack.packb([header.value, *rest], use_bin_type=True)


# In the coordinator.


@message_handler(Serving.CANCEL)
def handle_cancel(coordinator, sender_identity, payload) -> None:
    """Pass a client's cancellation on to the engine that has the request, unless it has ended."""
    client_request = payload[1]
    for request_id, known_as in coordinator.request_id_to_client_request_id.items():
        if known_as == client_request and coordinator.request_id_to_client_id[request_id] == sender_identity:
            coordinator._send_to_engine(coordinator.request_id_to_rank[request_id], _pack(Serving.CANCEL, request_id))
            return


@message_handler(Serving.TOKENS)
def handle_tokens(coordinator, sender_identity, payload) -> None:
    """Pass an engine's new tokens on, one message for each client."""
    of_clients = defaultdict(list)
    for request_id, *new in payload[1]:
        client_request = coordinator.request_id_to_client_request_id[request_id]
        of_clients[coordinator.request_id_to_client_id[request_id]].append([client_request, *new])
    for client, news in of_clients.items():
        coordinator.router_socket.send_multipart([client, _pack(Serving.TOKENS, news)])


class ServingCoordinator(DataParallelInferenceCoordinator):
    """Megatron's coordinator with the messages of this module; it lives as long as the process that started it."""

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


# In the engine.


class _Signals(deque):
    """The engine's queue of signals. It handles one a step and knows none but its own; CANCEL is handled on arrival."""

    def __init__(self, cancel: Callable[[int], Any]) -> None:
        super().__init__()
        self._cancel = cancel

    def append(self, message: bytes) -> None:
        header, *rest = msgpack.unpackb(message, raw=False)
        if header == Serving.CANCEL:
            self._cancel(*rest)
        else:
            super().append(message)


class ServingEngine(DMCInferenceEngine):
    """DMC's engine behind a coordinator: requests can be cancelled, and those that ask for it are streamed."""

    def reset(self) -> None:
        super().reset()
        self._pending_signals = _Signals(self.cancel)
        self._sent: dict[int, int] = {}  # tokens sent of each request that is streamed

    async def start_listening_to_data_parallel_coordinator(self, *args, **kwargs) -> str:
        with mock.patch.object(dynamic_engine, "DataParallelInferenceCoordinator", ServingCoordinator):
            address = await super().start_listening_to_data_parallel_coordinator(*args, **kwargs)
        if self.ep_world_size == 1:
            # Megatron's engine otherwise goes on with empty steps for a while after its last request, in case an
            # expert-parallel rank needs them. They reset the context, and its measure of compression with it.
            self.ep_consensus_interval = 1
        return address

    def add_request(self, request_id: int, prompt, sampling_params: SamplingParams | None = None):
        # Kept here, as the parameters of a request lose what Megatron does not know when it gives way.
        if getattr(sampling_params, "stream", False):
            self._sent[request_id] = 0
        return super().add_request(request_id, prompt, sampling_params)

    def _handle_failed_request(self, request_id: int) -> None:
        self._sent.pop(request_id, None)
        super()._handle_failed_request(request_id)

    def post_process_requests(self, request_ids, finished_request_ids, evict_request_ids, *args, **kwargs):
        result = super().post_process_requests(request_ids, finished_request_ids, evict_request_ids, *args, **kwargs)
        for request_id in () if evict_request_ids is None else evict_request_ids.tolist():
            *_, before, request = self.requests[request_id].record.requests
            # Megatron joins the pieces' lists, and cannot if one is missing.
            for name in ("generated_log_probs", "generated_top_n_logprobs"):
                if getattr(before, name) is not None:
                    setattr(request, name, [])
        for request_id in finished_request_ids.tolist():
            self._sent.pop(request_id, None)
        if self.use_coordinator and self.is_mp_coordinator:
            news = [new for i in request_ids.tolist() if i in self._sent and (new := self._new(i))]
            if news:
                self.socket_for_receiving_requests.send(_pack(Serving.TOKENS, news))
        return result

    def _new(self, request_id: int) -> list | None:
        """Number, tokens, log-probabilities and those of likely tokens, of what has not been sent and is certain."""
        record = self.requests[request_id].record
        sent = self._sent[request_id]
        # What may be the beginning of a stop word may yet be dropped.
        held = max(map(len, record[-1].stop_word_ids or ()), default=1) - 1
        count = sum(len(piece.generated_tokens) for piece in record.requests) - held - sent
        if count <= 0:
            return None
        self._sent[request_id] += count
        tokens, log_probs, top_n = (
            _after(record, name, sent, count)
            for name in ("generated_tokens", "generated_log_probs", "generated_top_n_logprobs")
        )
        return [request_id, tokens, log_probs, top_n]


def _after(record: DynamicInferenceRequestRecord, name: str, start: int, count: int) -> list:
    """`count` values from `start` on, of what a request's pieces hold together."""
    found: list = []
    for piece in record.requests:
        values = getattr(piece, name) or []
        if start < len(values):
            found += values[start : start + count - len(found)]
        start = max(start - len(values), 0)
    return found


# In the client.


class StreamingClient(InferenceClient):
    """Megatron's client, which also hears of tokens as they are generated, and can cancel."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
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
        sampling_params.add_attributes({"stream": True})
        request_id = self.next_request_id
        future = self.add_request(prompt, sampling_params)
        self._listeners[request_id] = listener
        return request_id, future

    def cancel(self, request_id: int) -> None:
        """Give a request up; without effect on one that has ended. Its reply holds what was generated."""
        self._send_signal_to_engines(Serving.CANCEL, request_id)

    @trace_async_exceptions
    async def _recv_task(self) -> None:
        while True:
            try:
                header, *rest = msgpack.unpackb(self.socket.recv(flags=zmq.NOBLOCK), raw=False)
            except zmq.Again:
                await asyncio.sleep(0.005)
                continue
            if header == Serving.TOKENS:
                for request_id, *new in rest[0]:
                    if (listener := self._listeners.get(request_id)) is not None:
                        listener(*new)
            elif header == Headers.ENGINE_REPLY:
                request_id, reply = rest
                self._listeners.pop(request_id, None)
                reply["latency"] = time.perf_counter() - self.request_submission_times.pop(request_id)
                future = self.completion_futures.pop(request_id)
                if not future.done():
                    future.set_result(DynamicInferenceRequest.deserialize(reply) if self.deserialize else reply)
