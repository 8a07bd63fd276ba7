"""An HTTP server in front of the engine, with OpenAI's interface for completions and chat.

`build_app` makes the aiohttp application over any `Backend`; `EngineBackend` is the one over `AsyncLLM`; `run` listens,
lets running requests finish when the process is asked to end, and ends the process when the engine has died. Neither
prompts nor answers are ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import signal
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import prometheus_client
from aiohttp import web
from megatron.core.inference.inference_request import Status
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from megatron_dmc.config import DMCError
from megatron_dmc.engine import failure

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready")
"""What can be asked without a key."""

COMPLETION_TOKENS = 16
"""Tokens that a completion generates if the request does not say; OpenAI's default. A chat goes on to the limit."""

MAX_LOG_PROBS = 20
MAX_STOP_WORDS = 16
RETRY_SECONDS = 1


@dataclass(frozen=True)
class ServerOptions:
    """What the server allows.

    Attributes:
        model_name: what requests call the model.
        api_key: what `Authorization: Bearer …` must say; `None` lets everyone in.
        max_concurrent: answers that may be under way at once; a request of several prompts or `n` counts as many.
        max_body_bytes: of a request.
        max_prompt_tokens, max_new_tokens: of one prompt and one answer; by default what the model's sequences hold.
        request_timeout: seconds that a request may take in all; `None` for any time.
        client_timeout: seconds that a client may take to send a request, or to take a piece of the answer.
        drain_seconds: how long running requests may go on once the server has been asked to end.
    """

    model_name: str
    api_key: str | None = None
    max_concurrent: int = 256
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    request_timeout: float | None = None
    client_timeout: float = 30.0
    drain_seconds: float = 30.0


@dataclass
class Tokens:
    """What a step has generated: tokens, and if asked for, their log-probabilities and those of likely tokens."""

    tokens: list[int]
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[dict[str, float]] = field(default_factory=list)


class RequestFailed(Exception):
    """The engine does not serve a request; the message says why."""


class Backend(Protocol):
    """What the server needs of an engine.

    Attributes:
        vocabulary: number of tokens.
        end: the token that ends an answer.
        max_sequence_length: of prompt and answer together.
    """

    vocabulary: int
    end: int | None
    max_sequence_length: int

    def tokenize(self, text: str) -> list[int]:
        """Raises `RequestFailed` for text that the tokenizer cannot take."""

    def detokenize(self, tokens: list[int]) -> str: ...

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as a prompt. Raises `RequestFailed` where the tokenizer cannot."""

    def generate(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Tokens]:
        """Generate as an asynchronous generator; closing it cancels the request. Raises `RequestFailed`."""

    async def died(self) -> str:
        """Return when the engine cannot serve any more, with the reason."""

    def numbers(self) -> Mapping[str, float]:
        """The state of the engine by the names in `ENGINE_NUMBERS`."""


class EngineBackend:
    """`Backend` over an `AsyncLLM`, whose engine runs on an event loop in a thread of its own."""

    def __init__(self, llm) -> None:
        self._llm = llm
        self._tokenizer = llm.controller.tokenizer
        self._loop = llm._loop_manager.loop
        self._client = llm._coord_runtime.client
        self.vocabulary = self._tokenizer.vocab_size
        self.end = getattr(self._tokenizer, "eod", None)
        self.max_sequence_length = llm.context.max_sequence_length

    def tokenize(self, text: str) -> list[int]:
        try:
            return self._tokenizer.tokenize(text)
        except ValueError as error:  # a tokenizer of numbers, for instance
            raise RequestFailed("the model's tokenizer cannot take this text") from error

    def detokenize(self, tokens: list[int]) -> str:
        return TextGenerationController.detokenize(self._tokenizer, tokens, remove_EOD=False)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        library = getattr(self._tokenizer, "_tokenizer", None)
        template = getattr(self._tokenizer, "chat_template", None)
        template = template or getattr(getattr(library, "tokenizer", None), "chat_template", None)
        if not template:
            raise RequestFailed("the model's tokenizer has no chat template: use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the template, a program of its own, makes of the messages
            raise RequestFailed(f"the tokenizer's chat template cannot take these messages: {error}") from error
        return self.tokenize(text)

    async def generate(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Tokens]:
        here = asyncio.get_running_loop()
        arrived: asyncio.Queue = asyncio.Queue()
        request_id = None

        def put(item: Any) -> None:
            here.call_soon_threadsafe(arrived.put_nowait, item)

        def submit() -> None:
            nonlocal request_id
            request_id, reply = self._client.stream_request(prompt, params, lambda *new: put(Tokens(*new)))
            reply.add_done_callback(put)

        def cancel() -> None:
            self._client.cancel(request_id)

        self._loop.call_soon_threadsafe(submit)
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
                self._loop.call_soon_threadsafe(cancel)

    async def died(self) -> str:
        engine = self._llm.engine
        while True:
            if engine.engine_loop_task.done() or not self._llm._loop_manager._thread.is_alive():
                return "the engine has ended"
            if not engine.inference_coordinator_process.is_alive():
                return "the coordinator's process has ended"
            await asyncio.sleep(0.2)

    def numbers(self) -> Mapping[str, float]:
        context = self._llm.context
        return {
            "running_requests": context.total_request_count,
            "waiting_requests": len(self._llm.engine.waiting_request_ids),
            "compression_ratio": context.account.ratio,
            "pages": len(context.cache.pages),
            "free_pages": round(context.account.free * context.cache.shape.layers * context.cache.shape.kv_heads),
            "evictions": self._llm.engine.evicted_request_count,
        }

    async def close(self) -> None:
        """End the engine and its coordinator."""
        process = self._llm.engine.inference_coordinator_process
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await self._llm.shutdown()
        await asyncio.to_thread(process.join, 2)  # the message that ends it may have been lost with its socket
        self.kill()

    def kill(self) -> None:
        """End the coordinator, whatever state it is in."""
        self._llm.engine.inference_coordinator_process.kill()


def _rest(request, sent: int) -> Tokens:
    """What an ended request has beyond the tokens that came before."""
    if request.status == Status.FAILED:
        raise RequestFailed(failure(request))
    values = (request.generated_tokens, request.generated_log_probs, request.generated_top_n_logprobs)
    return Tokens(*((found or [])[sent:] for found in values))


# What a request says.


class Refusal(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _unavailable(message: str) -> Refusal:
    return Refusal(message, status=503, headers={"Retry-After": str(RETRY_SECONDS)})


class _Fields:
    """The fields of a request, each checked when it is taken. `null` is the same as a field left out."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal(f"the request must be a JSON object; got {_kind(body)}")
        self._body = body

    def raw(self, name: str) -> Any:
        return self._body.get(name)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        value = self.raw(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise Refusal(f"{name} must be a whole number from {low} to {high}; got {_shown(value)}", name)
        return value

    def number(self, name: str, default: float, allowed: str, good: Callable[[float], bool]) -> float:
        value = self.raw(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not good(value):
            raise Refusal(f"{name} must be {allowed}; got {_shown(value)}", name)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw(name)
        if type(value) not in (bool, type(None)):
            raise Refusal(f"{name} must be true or false; got {_shown(value)}", name)
        return bool(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    return str(value) if type(value) in (int, float) and abs(value) < 1e18 else _kind(value)


UNSUPPORTED = {
    "seed": "the engine is seeded once, with --seed",
    "frequency_penalty": "the engine has no penalties",
    "presence_penalty": "the engine has no penalties",
    "logit_bias": "the engine samples from the model's own logits",
    "best_of": "ask for several answers with n",
    "suffix": "the model continues text, it does not fill in",
    "tools": "tool calls are not parsed",
    "functions": "function calls are not parsed",
    "response_format": "answers are free text",
}
"""Fields of OpenAI's that would change the answer and cannot be followed, and why."""

_NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""Values that change nothing."""


@dataclass
class Job:
    """A request that has been found sound."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    n: int
    stop: list[str]
    stream: bool
    usage_in_stream: bool
    log_probs: bool
    echo: list[str]

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.n


def _read_job(fields: _Fields, backend: Backend, options: ServerOptions, *, chat: bool) -> Job:
    """The request's job. Raises `Refusal`."""
    model = fields.raw("model")
    if model is not None and not isinstance(model, str):
        raise Refusal(f"model must be a string; got {_shown(model)}", "model")
    if model not in (None, options.model_name):
        raise Refusal(
            f"there is no model of this name; this server has {options.model_name!r}",
            "model",
            status=404,
            code="model_not_found",
        )
    for name, why in UNSUPPORTED.items():
        value = fields.raw(name)
        if value is not None and value not in _NEUTRAL.get(name, ()):
            raise Refusal(f"{name} is not supported: {why}; leave it out", name, code="unsupported_parameter")
    n = fields.integer("n", 1, 1, options.max_concurrent)
    echo = not chat and fields.flag("echo")
    log_probs, likely = _log_probs(fields, backend, chat)
    if echo and log_probs:
        raise Refusal("log-probabilities of the prompt are not kept: give either echo or logprobs", "logprobs")
    stream = fields.flag("stream")
    stream_options = fields.raw("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise Refusal(f"stream_options must be an object; got {_shown(stream_options)}", "stream_options")
    sampling = _sampling(fields, backend)
    stop = _stop(fields)
    prompts = [_chat_prompt(fields, backend)] if chat else _prompts(fields, backend)
    if len(prompts) * n > options.max_concurrent:
        raise Refusal(
            f"{len(prompts)} prompts of {n} answers each are more than the {options.max_concurrent} that the server "
            "takes at once; send fewer prompts a request, or a smaller n",
            "n",
        )
    params = [
        SamplingParams(
            **sampling,
            num_tokens_to_generate=_new_tokens(fields, len(prompt), backend, options, chat),
            return_log_probs=log_probs,
            skip_prompt_log_probs=log_probs,
            top_n_logprobs=likely,
        )
        for prompt in prompts
    ]
    return Job(
        prompts=prompts,
        params=params,
        n=n,
        stop=stop,
        stream=stream,
        usage_in_stream=_Fields(stream_options or {}).flag("include_usage"),
        log_probs=log_probs,
        echo=[backend.detokenize(prompt) for prompt in prompts] if echo else [""] * len(prompts),
    )


def _log_probs(fields: _Fields, backend: Backend, chat: bool) -> tuple[bool, int]:
    """Whether log-probabilities are asked for, and of how many likely tokens."""
    most = min(MAX_LOG_PROBS, backend.vocabulary)
    if not chat:
        likely = fields.integer("logprobs", None, 0, most)
        return likely is not None, likely or 0
    asked, likely = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, most)
    if likely and not asked:
        raise Refusal("top_logprobs needs logprobs to be true", "top_logprobs")
    return asked, likely


def _sampling(fields: _Fields, backend: Backend) -> dict[str, Any]:
    temperature = fields.number("temperature", 1.0, "a number from 0 to 2", lambda x: 0 <= x <= 2)
    top_p = fields.number("top_p", 1.0, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
    top_k = fields.integer("top_k", 0, 0, backend.vocabulary - 1)
    if top_k and top_p < 1:
        raise Refusal(f"give either top_k or top_p; got {top_k} and {top_p}", "top_k")
    if temperature == 0:
        return dict(temperature=1.0, top_k=1, top_p=0.0)
    return dict(temperature=temperature, top_k=top_k, top_p=0.0 if top_p == 1 else top_p)  # 0: of all tokens


def _stop(fields: _Fields) -> list[str]:
    stop = fields.raw("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise Refusal("stop must be a string or a list of strings, none of them empty", "stop")
    if len(stop) > MAX_STOP_WORDS:
        raise Refusal(f"stop may have {MAX_STOP_WORDS} strings; got {len(stop)}", "stop")
    return stop


def _prompts(fields: _Fields, backend: Backend) -> list[list[int]]:
    prompt = fields.raw("prompt")
    if prompt is None:
        raise Refusal("the request has no prompt", "prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise Refusal(f"prompt must be text, token ids, or a list of either; got {_shown(prompt)}", "prompt")
    if not prompt:
        raise Refusal("prompt is an empty list", "prompt")
    return [_prompt_tokens(one, backend) for one in prompt]


def _prompt_tokens(prompt: Any, backend: Backend) -> list[int]:
    if isinstance(prompt, str):
        tokens = _tokenize(prompt, backend)
    elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
        tokens = prompt
        if (wrong := next((t for t in tokens if not 0 <= t < backend.vocabulary), None)) is not None:
            raise Refusal(
                f"token {_shown(wrong)} of the prompt does not exist: the vocabulary has {backend.vocabulary}", "prompt"
            )
    else:
        raise Refusal("prompt must be text, token ids, or a list of either; it holds something else", "prompt")
    if not tokens:
        raise Refusal("a prompt is empty: the model needs at least one token to continue", "prompt")
    return tokens


def _tokenize(text: str, backend: Backend) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"the text holds half of a surrogate pair at position {error.start}", "prompt") from error
    try:
        return backend.tokenize(text)
    except RequestFailed as error:
        raise Refusal(str(error), "prompt") from error


def _chat_prompt(fields: _Fields, backend: Backend) -> list[int]:
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("the request needs messages: a list of at least one", "messages")
    conversation = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal("each message must be an object with a role and content", "messages")
        conversation.append({"role": message["role"], "content": _content(message.get("content"))})
    try:
        tokens = backend.chat_tokens(conversation)
    except RequestFailed as error:
        raise Refusal(str(error), "messages") from error
    if not tokens:
        raise Refusal("the messages are empty: the model needs at least one token to continue", "messages")
    return tokens


def _content(content: Any) -> str:
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise Refusal("the content of a message must be a string, or a list of parts of the type text", "messages")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"a message holds half of a surrogate pair at position {error.start}", "messages") from error
    return content


def _new_tokens(fields: _Fields, prompt: int, backend: Backend, options: ServerOptions, chat: bool) -> int:
    param = "messages" if chat else "prompt"
    longest = min(options.max_prompt_tokens or math.inf, backend.max_sequence_length - 1)
    if prompt > longest:
        raise Refusal(
            f"the prompt has {prompt} tokens, at most {longest} are allowed; shorten it",
            param,
            code="context_length_exceeded",
        )
    left = backend.max_sequence_length - prompt
    most = min(options.max_new_tokens or left, left)
    name = "max_completion_tokens" if chat and fields.raw("max_completion_tokens") is not None else "max_tokens"
    return fields.integer(name, most if chat else min(COMPLETION_TOKENS, most), 1, most)


# What an answer says.


@dataclass
class Token:
    """A token of an answer, for its log-probabilities."""

    text: str
    log_prob: float
    likely: dict[str, float]
    offset: int


class AnswerText:
    """The text of an answer as it becomes certain.

    A character of several bytes waits for its last one, and what may be the beginning of a stop word for what follows.

    Attributes:
        stopped: whether a stop word has come; the text ends before it.
    """

    def __init__(self, detokenize: Callable[[list[int]], str], stop: list[str]) -> None:
        self._detokenize, self._stop = detokenize, stop
        # Text of a token depends on the ones before it: those from `_begin` on are detokenized together, of which those
        # before `_read` have been turned into text.
        self._tokens: list[int] = []
        self._begin = self._read = 0
        self._held, self._given = "", 0
        self._pending: list[Token] = []
        self.stopped = False

    def add(self, new: Tokens) -> tuple[str, list[Token]]:
        """What has become certain with these tokens: text, and the tokens in it if they have log-probabilities."""
        for i, token in enumerate(new.tokens):
            if new.log_probs:
                likely = new.top_log_probs[i] if new.top_log_probs else {}
                offset = self._given + len(self._held)
                self._pending.append(Token(self._detokenize([token]), new.log_probs[i], likely, offset))
            self._tokens.append(token)
            text = self._detokenize(self._tokens[self._begin :])
            if not text.endswith("\ufffd"):
                self._take(text)
            if self.stopped:
                break
        certain = len(self._held) - (0 if self.stopped else self._beginning_of_stop())
        return self._give(certain)

    def end(self) -> tuple[str, list[Token]]:
        """What is left when there is no more to come."""
        if not self.stopped and self._read < len(self._tokens):
            self._take(self._detokenize(self._tokens[self._begin :]))
        text, tokens = self._give(len(self._held))
        return text, tokens if self.stopped else tokens + self._pending

    def _take(self, text: str) -> None:
        before = self._detokenize(self._tokens[self._begin : self._read]) if self._read > self._begin else ""
        searched = max(len(self._held) - max(map(len, self._stop), default=0), 0)
        self._held += text[len(before) :]
        self._begin, self._read = self._read, len(self._tokens)
        found = [at for word in self._stop if (at := self._held.find(word, searched)) >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True

    def _beginning_of_stop(self) -> int:
        """How much of the end may be the beginning of a stop word."""
        lengths = (k for word in self._stop for k in range(1, len(word)) if self._held.endswith(word[:k]))
        return max(lengths, default=0)

    def _give(self, count: int) -> tuple[str, list[Token]]:
        text, self._held = self._held[:count], self._held[count:]
        self._given += count
        certain = [token for token in self._pending if token.offset < self._given]
        self._pending = self._pending[len(certain) :]
        return text, certain


@dataclass
class Delta:
    """What one answer of a request has more of: text, tokens for their log-probabilities, and at its end, the reason.

    Attributes:
        generated: how many tokens the answer has had so far.
    """

    index: int
    text: str
    tokens: list[Token]
    generated: int
    finish: str | None = None


class _Shape:
    """How the answers to one request look: those of /v1/completions."""

    whole = piece = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str) -> None:
        self._common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, choices: list, usage: dict | None, *, stream: bool = False) -> dict:
        kind = self.piece if stream else self.whole
        return self._common | {"object": kind, "choices": choices} | ({} if usage is None else {"usage": usage})

    def first(self, index: int, echo: str) -> dict | None:
        """The chunk of a stream before all others."""
        return self.chunk(Delta(index, echo, [], 0), None) if echo else None

    def choice(self, index: int, text: str, finish: str, tokens: list[Token] | None) -> dict:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": self._log_probs(tokens)}

    def chunk(self, delta: Delta, tokens: list[Token] | None) -> dict:
        return self.choice(delta.index, delta.text, delta.finish, tokens)

    def _log_probs(self, tokens: list[Token] | None) -> dict | None:
        if tokens is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [token.likely for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class _ChatShape(_Shape):
    """How the answers to one request of /v1/chat/completions look."""

    whole, piece = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self, index: int, echo: str) -> dict:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}

    def choice(self, index: int, text: str, finish: str, tokens: list[Token] | None) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": finish, "logprobs": self._log_probs(tokens)}

    def chunk(self, delta: Delta, tokens: list[Token] | None) -> dict:
        content = {"content": delta.text} if delta.text else {}
        return {
            "index": delta.index,
            "delta": content,
            "finish_reason": delta.finish,
            "logprobs": self._log_probs(tokens),
        }

    def _log_probs(self, tokens: list[Token] | None) -> dict | None:
        def entry(text: str, log_prob: float) -> dict:
            return {"token": text, "logprob": log_prob, "bytes": list(text.encode(errors="replace"))}

        if tokens is None:
            return None
        content = [
            entry(token.text, token.log_prob) | {"top_logprobs": [entry(*likely) for likely in token.likely.items()]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _usage(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


ENGINE_NUMBERS = {
    "running_requests": "requests in the cache",
    "waiting_requests": "requests that wait for the cache, those that gave way among them",
    "compression_ratio": "tokens per cache entry, of all that there is and was",
    "pages": "pages of the cache",
    "free_pages": "pages that nobody holds",
    "evictions": "requests that gave their pages back to be computed again",
}
"""What /metrics tells of the engine."""


class _Metrics:
    """What /metrics shows."""

    def __init__(self, backend: Backend) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        common = dict(namespace="megatron_dmc", registry=self.registry)
        self.requests = prometheus_client.Counter(
            "requests", "HTTP requests by endpoint and status", ["endpoint", "status"], **common
        )
        self.prompt_tokens = prometheus_client.Counter("prompt_tokens", "tokens of prompts", **common)
        self.generated_tokens = prometheus_client.Counter("generated_tokens", "tokens of answers", **common)
        self.first_token = prometheus_client.Histogram(
            "time_to_first_token_seconds",
            "from a request's arrival to an answer's first token",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            **common,
        )
        self.later_token = prometheus_client.Histogram(
            "time_per_output_token_seconds",
            "of an answer's tokens after its first",
            buckets=(0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1),
            **common,
        )
        self._backend = backend
        self.registry.register(self)

    def collect(self):
        """The engine's numbers, for Prometheus's registry."""
        numbers = self._backend.numbers()
        for name, help in ENGINE_NUMBERS.items():
            kind = CounterMetricFamily if name == "evictions" else GaugeMetricFamily
            yield kind(f"megatron_dmc_{name}", help, value=numbers[name])


class Server:
    """The handlers of the application, and what they share.

    Attributes:
        answers: how many are under way.
        closed: why no request is taken any more, or `None`.
    """

    def __init__(self, backend: Backend, options: ServerOptions) -> None:
        self.backend, self.options = backend, options
        self.answers = 0
        self.closed: str | None = None
        self._metrics = _Metrics(backend)
        self._began = int(time.time())
        self._running: set[asyncio.Queue] = set()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware], client_max_size=self.options.max_body_bytes)
        app[SERVER] = self
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat_completions),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._show_metrics),
            ]
        )
        return app

    def abandon(self, reason: str) -> None:
        """End all running requests with the status 503, or where their answer has begun, with an error in it."""
        for queue in self._running:
            queue.put_nowait(_unavailable(reason))

    async def idle(self) -> None:
        """Return when no request is running."""
        while self._running:
            await asyncio.sleep(0.05)

    @web.middleware
    async def _middleware(self, request: web.Request, handler) -> web.StreamResponse:
        """Keys, errors in OpenAI's shape, and the count of requests."""
        status = 499  # the client has gone
        try:
            try:
                self._check_key(request)
                response = await handler(request)
            except Refusal as refusal:
                response = web.json_response(refusal.body, status=refusal.status, headers=refusal.headers)
            except web.HTTPException as error:
                refusal = Refusal(_reason(error, request, self.options), status=error.status)
                headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
                response = web.json_response(refusal.body, status=error.status, headers=headers)
            except ConnectionResetError:
                raise
            except Exception as error:
                # Its message might quote a prompt.
                where = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s in a request to %s\n%s", type(error).__name__, request.path, where)
                response = web.json_response(Refusal("the server has made a mistake", status=500).body, status=500)
            status = response.status
            return response
        finally:
            route = request.match_info.route.resource
            self._metrics.requests.labels(route.canonical if route else "unknown", status).inc()

    def _check_key(self, request: web.Request) -> None:
        key = self.options.api_key
        if key is None or request.path in OPEN_PATHS:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), key.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refusal(
                "the request needs the header `Authorization: Bearer KEY` with the server's key",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self.closed is not None:
            raise _unavailable(self.closed)
        return web.json_response({"status": "ready"})

    async def _models(self, request: web.Request) -> web.Response:
        model = {
            "id": self.options.model_name,
            "object": "model",
            "created": self._began,
            "owned_by": "megatron-dmc",
            "max_model_len": self.backend.max_sequence_length,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        text = prometheus_client.generate_latest(self._metrics.registry)
        return web.Response(body=text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, _Shape(self.options.model_name), chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, _ChatShape(self.options.model_name), chat=True)

    async def _answer(self, request: web.Request, shape: _Shape, *, chat: bool) -> web.StreamResponse:
        arrival = time.perf_counter()
        if self.closed is not None:
            raise _unavailable(self.closed)
        body = await self._body(request)
        job = _read_job(_Fields(body), self.backend, self.options, chat=chat)
        if self.closed is not None:
            raise _unavailable(self.closed)
        if self.answers + job.answers > self.options.max_concurrent:
            raise Refusal(
                f"{self.answers} answers are under way, and the server takes {self.options.max_concurrent} at once; "
                "try again later",
                status=429,
                code="too_many_requests",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.answers += job.answers
        self._metrics.prompt_tokens.inc(sum(map(len, job.prompts)))
        try:
            async with contextlib.aclosing(self._deltas(job, arrival)) as deltas:
                if job.stream:
                    return await self._streamed(request, shape, job, deltas)
                return await self._whole(shape, job, deltas)
        finally:
            self.answers -= job.answers

    async def _body(self, request: web.Request) -> Any:
        try:
            async with asyncio.timeout(self.options.client_timeout):
                body = await request.read()
        except TimeoutError as error:
            raise Refusal(
                f"the request did not arrive within {self.options.client_timeout:g} seconds", status=408
            ) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal("the request is not JSON") from error

    async def _deltas(self, job: Job, arrival: float) -> AsyncIterator[Delta]:
        """What the answers of a job consist of, as it comes. Closing this cancels what is still running."""
        arrived: asyncio.Queue = asyncio.Queue()
        self._running.add(arrived)
        tasks = [asyncio.create_task(self._follow(job, index, arrived, arrival)) for index in range(job.answers)]
        if (seconds := self.options.request_timeout) is not None:
            late = Refusal(f"the answer took more than {seconds:g} seconds", status=504)
            asyncio.get_running_loop().call_later(seconds, arrived.put_nowait, late)
        try:
            left = len(tasks)
            while left:
                item = await arrived.get()
                if isinstance(item, RequestFailed):
                    raise Refusal(str(item)) from item
                if isinstance(item, Exception):
                    raise item
                left -= item.finish is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._running.discard(arrived)

    async def _follow(self, job: Job, index: int, arrived: asyncio.Queue, arrival: float) -> None:
        """One answer of a job, into the queue."""
        prompt, params = job.prompts[index // job.n], job.params[index // job.n]
        text, generated, first = AnswerText(self.backend.detokenize, job.stop), 0, arrival
        finish = "stop"
        try:
            async with contextlib.aclosing(self.backend.generate(prompt, params)) as pieces:
                async for piece in pieces:
                    if generated == 0:
                        first = time.perf_counter()
                        self._metrics.first_token.observe(first - arrival)
                    generated += len(piece.tokens)
                    self._metrics.generated_tokens.inc(len(piece.tokens))
                    if piece.tokens[-1] == self.backend.end:
                        piece.tokens.pop()
                    elif generated >= params.num_tokens_to_generate:
                        finish = "length"
                    delta = Delta(index, *text.add(piece), generated)
                    if text.stopped:
                        finish = "stop"
                        break
                    if delta.text or delta.tokens:
                        arrived.put_nowait(delta)
            rest = delta if text.stopped else Delta(index, *text.end(), generated)
            rest.finish = finish
            if generated > 1:
                self._metrics.later_token.observe((time.perf_counter() - first) / (generated - 1))
            arrived.put_nowait(rest)
        except Exception as error:
            arrived.put_nowait(error)

    async def _whole(self, shape: _Shape, job: Job, deltas: AsyncIterator[Delta]) -> web.Response:
        texts: list[list[str]] = [[job.echo[i // job.n]] for i in range(job.answers)]
        tokens: list[list[Token]] = [[] for _ in range(job.answers)]
        generated, finish = [0] * job.answers, [""] * job.answers
        async for delta in deltas:
            texts[delta.index].append(delta.text)
            tokens[delta.index] += delta.tokens
            generated[delta.index], finish[delta.index] = delta.generated, delta.finish
        choices = [
            shape.choice(i, "".join(texts[i]), finish[i], tokens[i] if job.log_probs else None)
            for i in range(job.answers)
        ]
        return web.json_response(shape.answer(choices, _usage(sum(map(len, job.prompts)), sum(generated))))

    async def _streamed(
        self, request: web.Request, shape: _Shape, job: Job, deltas: AsyncIterator[Delta]
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

        async def send(message: dict | str) -> None:
            text = message if isinstance(message, str) else json.dumps(message)
            try:
                async with asyncio.timeout(self.options.client_timeout):
                    await response.write(f"data: {text}\n\n".encode())
            except TimeoutError as error:
                request.transport.abort()
                raise ConnectionResetError("the client does not take its answer") from error

        generated = [0] * job.answers
        try:
            async for delta in deltas:
                if not response.prepared:  # only now: what the engine refuses has a status of its own
                    await response.prepare(request)
                    for index in range(job.answers):
                        if (first := shape.first(index, job.echo[index // job.n])) is not None:
                            await send(shape.answer([first], None, stream=True))
                generated[delta.index] = delta.generated
                chunk = shape.chunk(delta, delta.tokens if job.log_probs else None)
                await send(shape.answer([chunk], None, stream=True))
            if job.usage_in_stream:
                await send(shape.answer([], _usage(sum(map(len, job.prompts)), sum(generated)), stream=True))
            await send("[DONE]")
        except Refusal as refusal:
            if not response.prepared:
                raise
            await send(refusal.body)
        await response.write_eof()
        return response


SERVER = web.AppKey("server", Server)


def _reason(error: web.HTTPException, request: web.Request, options: ServerOptions) -> str:
    if error.status == 404:
        return "there is nothing at this path; see /v1/models, /v1/completions and /v1/chat/completions"
    if error.status == 405:
        return f"{request.method} is not allowed here; {error.headers.get('Allow', '')} is"
    if error.status == 413:
        return f"the request has more than {options.max_body_bytes} bytes"
    return error.reason


def build_app(backend: Backend, options: ServerOptions) -> web.Application:
    """The application. It must run with aiohttp's `handler_cancellation`, for requests to end with their clients."""
    return Server(backend, options).application()


async def run(backend: Backend, options: ServerOptions, host: str, port: int) -> bool:
    """Serve until the process is asked to end, or the engine has died.

    On SIGTERM or SIGINT no request is taken any more, and those that run may finish for `drain_seconds`; a second
    signal ends them at once.

    Returns:
        whether the engine is still alive.

    Raises:
        DMCError: where the server cannot listen.
    """
    server = Server(backend, options)
    runner = web.AppRunner(
        server.application(), access_log=None, handler_cancellation=True, keepalive_timeout=30, shutdown_timeout=5
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise DMCError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        _announce(runner, options, host)
        return await _serve(server)
    finally:
        await runner.cleanup()


def _announce(runner: web.AppRunner, options: ServerOptions, host: str) -> None:
    if options.api_key is None and not _loopback(host):
        print(
            f"megatron-dmc: warning: everyone who reaches {host} may use this server; set MEGATRON_DMC_API_KEY to "
            "ask for a key",
            file=sys.stderr,
        )
    address, port = runner.addresses[0][:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"megatron-dmc: serving {options.model_name} on http://{shown}:{port}", file=sys.stderr, flush=True)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(server: Server) -> bool:
    """Until a signal or the engine's death, and what follows; returns whether the engine is alive."""
    asked: asyncio.Queue = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.put_nowait, number)
    died = asyncio.create_task(server.backend.died())

    async def first_of(*others) -> None:
        tasks = [asyncio.create_task(other) for other in others]
        await asyncio.wait([died, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    await first_of(asked.get())
    if not died.done():
        server.closed = "the server is about to end"
        await first_of(server.idle(), asked.get(), asyncio.sleep(server.options.drain_seconds))
    alive = not died.done()
    if alive:
        died.cancel()
        server.abandon("the server has ended")
    else:
        server.closed = died.result()
        print(f"megatron-dmc serve: {died.result()}", file=sys.stderr, flush=True)
        server.abandon(died.result())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            await server.idle()
    return alive
