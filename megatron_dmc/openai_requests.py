"""Requests in OpenAI's shapes: what `/v1/completions` and `/v1/chat/completions` take, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core.inference.sampling_params import SamplingParams

from megatron_dmc.config import DMCError

if TYPE_CHECKING:
    from megatron_dmc.server import Backend

COMPLETION_TOKENS = 16
"""Tokens that a completion generates if the request does not say; OpenAI's default. A chat goes on to the limit."""

NEVER = -1
"""The token that ends an answer with `ignore_eos`, a field that OpenAI's servers lack and others have: none does."""

MAX_LOG_PROBS = 20
MAX_STOP_WORDS = 16


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


class RequestFailed(DMCError):
    """The engine does not serve a request; the message says why."""


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


class _Fields:
    """The fields of a request, each checked when it is taken. `null` is the same as a field left out."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal(f"the request must be a JSON object; got {_kind(body)}")
        self._body = body
        self._taken: set[str] = set()

    def raw(self, name: str) -> Any:
        self._taken.add(name)
        return self._body.get(name)

    def unknown(self) -> list[str]:
        """Fields that nobody has taken."""
        return [name for name, value in self._body.items() if value is not None and name not in self._taken]

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
    "tool_choice": "tool calls are not parsed",
    "functions": "function calls are not parsed",
    "function_call": "function calls are not parsed",
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
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""Values that change nothing."""

_INERT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
"""Fields of OpenAI's that an answer does not depend on."""


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


def read_job(body: Any, backend: Backend, options: ServerOptions, *, chat: bool) -> Job:
    """The job that a request's JSON asks for. Raises `Refusal`."""
    fields = _Fields(body)
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
    if fields.flag("ignore_eos"):
        sampling["termination_id"] = NEVER
    stop = _stop(fields)
    prompts = [_chat_prompt(fields, backend)] if chat else _prompts(fields, backend)
    limits = [_new_tokens(fields, len(prompt), backend, options, chat) for prompt in prompts]
    if unknown := sorted(set(fields.unknown()) - _INERT):
        raise Refusal(
            f"there is no field {unknown[0][:80]!r} that this server could follow; leave it out", unknown[0][:80],
            code="unknown_parameter",
        )  # fmt: skip
    if len(prompts) * n > options.max_concurrent:
        raise Refusal(
            f"{len(prompts)} prompts of {n} answers each are more than the {options.max_concurrent} that the server "
            "takes at once; send fewer prompts a request, or a smaller n",
            "n",
        )
    params = [
        SamplingParams(
            **sampling,
            num_tokens_to_generate=limit,
            return_log_probs=log_probs,
            skip_prompt_log_probs=log_probs,
            top_n_logprobs=likely,
        )
        for limit in limits
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
    limit = fields.integer("max_tokens", most if chat else min(COMPLETION_TOKENS, most), 1, most)
    return fields.integer("max_completion_tokens", limit, 1, most) if chat else limit
