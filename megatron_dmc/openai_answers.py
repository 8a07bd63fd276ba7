"""Answers in OpenAI's shapes: an answer's text as its tokens come, and completions and chats made of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Tokens:
    """What a step has generated: tokens, and if asked for, their log-probabilities and those of likely tokens."""

    tokens: list[int]
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[dict[str, float]] = field(default_factory=list)


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

    def __init__(self, detokenize: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
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


class CompletionShape:
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


class ChatShape(CompletionShape):
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


def usage_of(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
