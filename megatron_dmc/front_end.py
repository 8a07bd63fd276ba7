"""The HTTP server's process: it listens while the model is still being loaded, and takes no time from the engine.

The process that has the engine (rank 0) holds a `FrontEnd`. In the new process, `EngineBackend` is the server's way to
the engine, through Megatron's coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import accepts_parameter

from megatron_dmc.cli import quiet
from megatron_dmc.config import DMCError
from megatron_dmc.messages import StreamingClient
from megatron_dmc.openai_answers import Tokens
from megatron_dmc.openai_requests import RequestFailed, ServerOptions
from megatron_dmc.server import Orders, run
from megatron_dmc.token_text import tokenize_prompt


@dataclass
class EngineAddress:
    """What the front end has to know of an engine.

    Attributes:
        coordinator: where it listens.
        tokenizer: Megatron's.
        max_sequence_length: of prompt and answer together.
    """

    coordinator: str
    tokenizer: Any
    max_sequence_length: int

    @classmethod
    def of(cls, llm) -> EngineAddress:
        """That of an `AsyncLLM`, on rank 0."""
        return cls(llm._coord_runtime.coord_addr, llm.controller.tokenizer, llm.context.max_sequence_length)


class EngineBackend:
    """The server's `Backend` over an engine elsewhere. To be constructed on the server's event loop."""

    def __init__(self, engine: EngineAddress) -> None:
        self._tokenizer = engine.tokenizer
        self.vocabulary = self._tokenizer.vocab_size
        self.end = getattr(self._tokenizer, "eod", None)
        self.max_sequence_length = engine.max_sequence_length
        self.detokenize = self._tokenizer.detokenize
        if accepts_parameter(self.detokenize, "skip_special_tokens"):
            self.detokenize = partial(self.detokenize, skip_special_tokens=True)
        self._client = StreamingClient(engine.coordinator, deserialize=True)
        self._client.start(asyncio.get_running_loop())

    def tokenize(self, text: str) -> list[int]:
        try:
            return tokenize_prompt(self._tokenizer, text)
        except ValueError as error:  # a tokenizer of numbers, for instance
            raise RequestFailed("the model's tokenizer cannot take this text") from error

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        library = getattr(self._tokenizer, "_tokenizer", None)
        template = getattr(self._tokenizer, "chat_template", None)
        template = template or getattr(getattr(library, "tokenizer", None), "chat_template", None)
        if not template:
            raise RequestFailed("the model's tokenizer has no chat template: use /v1/completions")
        try:
            # Tokenized by the template's own rules: the text alone would get a second token for its beginning.
            found = self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=True, add_generation_prompt=True
            )
        except Exception as error:  # whatever the template, a program of its own, makes of the messages
            raise RequestFailed(f"the tokenizer's chat template cannot take these messages: {error}") from error
        return list(found if isinstance(found, list) else found["input_ids"])

    def generate(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Tokens]:
        return self._client.stream(prompt, params)

    def numbers(self) -> Mapping[str, float]:
        """Those of all data-parallel ranks together."""
        states = list(self._client.states.values())
        total = {name: sum(state[name] for state in states) for name in (states[0] if states else ())}
        tokens, entries = total.pop("tokens", 0), total.pop("entries", 0)
        return total | {"compression_ratio": tokens / entries if entries else float("nan")}

    def close(self) -> None:
        self._client.stop()


# Between the two processes: an `EngineAddress` once the engine is there, `_END`, or text that says what has died.

_END = None


class FrontEnd:
    """The front end as rank 0 has it: a process of its own.

    Args:
        listener: the socket that it accepts connections from.
        options: see `ServerOptions`.
    """

    def __init__(self, listener: socket.socket, options: ServerOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(listener, options, theirs), name="front end")
        self.process.start()
        theirs.close()
        listener.close()

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *raised: object) -> None:
        self._orders.close()  # it ends by itself
        self.process.join(10)
        self.process.kill()
        self.process.join()

    def open(self, engine: EngineAddress) -> None:
        """Let requests in."""
        self._tell(engine)

    def end(self) -> None:
        """Take no requests any more, and end once those that run have ended; the second time, end."""
        self._tell(_END)

    def died(self, reason: str) -> None:
        """Nobody is left who could answer: say so to the clients, and end."""
        self._tell(reason)

    def _tell(self, what: EngineAddress | str | None) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._orders.send(what)


def _main(listener: socket.socket, options: ServerOptions, orders: Connection) -> None:
    # Signals for the whole process group mean rank 0, which passes them on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    quiet()
    sys.exit(0 if asyncio.run(_serve(listener, options, orders)) else 1)


async def _serve(listener: socket.socket, options: ServerOptions, connection: Connection) -> bool:
    loop = asyncio.get_running_loop()
    orders, engine = Orders(), loop.create_future()

    def hear() -> None:
        try:
            said = connection.recv()
        except Exception as error:  # whatever a tokenizer's class may raise here that did not over there
            if not isinstance(error, (EOFError, OSError)):
                orders.died(f"the engine's tokenizer does not arrive in the server's process: {error}")
                return
            said = "the engine's process has ended"
            loop.remove_reader(connection.fileno())
            if engine.done() and orders.dead is None:  # killed: it could not say so itself
                print(f"megatron-dmc serve: {said}", file=sys.stderr, flush=True)
        if isinstance(said, EngineAddress):
            engine.set_result(said)
        elif said is _END:
            orders.end()
        else:
            orders.died(said)

    async def backend() -> EngineBackend:
        nonlocal found
        found = EngineBackend(await engine)
        return found

    found: EngineBackend | None = None
    loop.add_reader(connection.fileno(), hear)
    try:
        return await run(backend(), options, listener, orders)
    finally:
        if found is not None:
            found.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        DMCError: where that cannot be.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise DMCError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
