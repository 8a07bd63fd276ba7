"""The engine behind a coordinator: requests can be cancelled and streamed, and it tells how it is.

What it adapts of Megatron's engine was checked against megatron-core 0.19.2; `megatron_dmc.messages` says what the
messages are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgpack
from megatron.core.inference.engines import dynamic_engine
from megatron.core.inference.inference_request import DynamicInferenceRequestRecord
from megatron.core.inference.sampling_params import SamplingParams

from megatron_dmc.engine import DMCInferenceEngine
from megatron_dmc.messages import Serving, ServingCoordinator, pack

STATE_SECONDS = 0.5
"""Between two messages about the engine's state."""


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


class Streaming:
    """What an engine of Megatron's gains behind a coordinator: CANCEL, TOKENS and STATE.

    The engine that this is mixed into has `cancel(request_id)`, and says in `numbers` how it is.
    """

    def numbers(self) -> dict[str, float]:
        """The engine's state: requests and evictions so far."""
        return {
            "running_requests": self.context.total_request_count,
            "waiting_requests": len(self.waiting_request_ids),
            "evictions": self.evicted_request_count,
        }

    def reset(self) -> None:
        super().reset()
        self._pending_signals = _Signals(self.cancel)
        self._sent: dict[int, int] = {}  # tokens sent of each request that is streamed
        self._told = 0.0  # when the state was last sent

    async def start_listening_to_data_parallel_coordinator(self, *args, **kwargs) -> str:
        with mock.patch.object(dynamic_engine, "DataParallelInferenceCoordinator", ServingCoordinator):
            address = await super().start_listening_to_data_parallel_coordinator(*args, **kwargs)
        if self.ep_world_size == 1:
            # Megatron's engine otherwise goes on with empty steps for a while after its last request, in case an
            # expert-parallel rank needs them. They reset the context, and its measure of compression with it.
            self.ep_consensus_interval = 1
        return address

    def schedule_requests(self) -> int:
        received = super().schedule_requests()
        if self.is_mp_coordinator and (now := time.monotonic()) >= self._told + STATE_SECONDS:
            self._told = now
            self.socket_for_receiving_requests.send(pack(Serving.STATE, self.numbers()))
        return received

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
                self.socket_for_receiving_requests.send(pack(Serving.TOKENS, news))
        return result

    def _new(self, request_id: int) -> list | None:
        """Number, tokens, log-probabilities and those of likely tokens, of what has not been sent and is certain."""
        record, sent = self.requests[request_id].record, self._sent[request_id]
        request = record[-1]
        if len(record.requests) == 1 and not request.stop_word_ids and not request.generated_log_probs:  # quicker
            tokens = request.generated_tokens[sent:]
            self._sent[request_id] += len(tokens)
            return [request_id, tokens, [], []] if tokens else None
        # What may be the beginning of a stop word may yet be dropped.
        held = max(map(len, request.stop_word_ids or ()), default=1) - 1
        count = sum(len(piece.generated_tokens) for piece in record.requests) - held - sent
        if count <= 0:
            return None
        self._sent[request_id] += count
        tokens, log_probs, top_n = (
            _after(record, name, sent, count)
            for name in ("generated_tokens", "generated_log_probs", "generated_top_n_logprobs")
        )
        return [request_id, tokens, log_probs, top_n]


class ServingEngine(Streaming, DMCInferenceEngine):
    """DMC's engine behind a coordinator."""

    def schedule_requests(self) -> int:
        received = super().schedule_requests()
        if not self.has_unfinished_requests():  # no step follows, with which Megatron forgets what it refused
            self.forget_failed()
        return received

    def numbers(self) -> dict[str, float]:
        """Besides, tokens and entries of all requests so far, and the cache's pages (of this rank's heads)."""
        context, account = self.context, self.context.account
        return super().numbers() | {
            "tokens": account.ended_tokens + sum(account.tokens),
            "entries": account.ended_entries + sum(account.entries),
            "pages": len(context.cache.pages),
            "free_pages": round(account.free * len(context.cache.pages) / context.pages_by_head),
        }


def _after(record: DynamicInferenceRequestRecord, name: str, start: int, count: int) -> list:
    """`count` values from `start` on, of what a request's pieces hold together."""
    found: list = []
    for piece in record.requests:
        values = getattr(piece, name) or []
        if start < len(values):
            found += values[start : start + count - len(found)]
        start = max(start - len(values), 0)
    return found
