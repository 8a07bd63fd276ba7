"""An HTTP server in front of the engine, with OpenAI's interface for completions and chat.

`run` serves over any `Backend` (`megatron_dmc.front_end` has the one over the engine): it answers while there is none
yet, lets running requests finish when it is asked to end, and ends when the engine has died. Neither prompts nor
answers are ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import socket
import sys
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Protocol

import prometheus_client
from aiohttp import web
from megatron.core.inference.sampling_params import SamplingParams
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from megatron_dmc.openai_answers import AnswerText, ChatShape, CompletionShape, Delta, Token, Tokens, usage_of
from megatron_dmc.openai_requests import Job, Refusal, RequestFailed, ServerOptions, read_job

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready")
"""What can be asked without a key."""

RETRY_SECONDS = 1


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

    def numbers(self) -> Mapping[str, float]:
        """The state of the engine by the names in `ENGINE_NUMBERS`, as far as it is known."""


class Orders:
    """What `run` is told from outside."""

    def __init__(self) -> None:
        self._once, self._twice = asyncio.Event(), asyncio.Event()
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """Take no request any more, and end once those that run have ended; the second time, end."""
        (self._twice if self._once.is_set() else self._once).set()

    def died(self, reason: str) -> None:
        """The engine cannot serve any more."""
        if not self._dead.done():
            self._dead.set_result(reason)

    @property
    def dead(self) -> str | None:
        """Why the engine cannot, if it has died."""
        return self._dead.result() if self._dead.done() else None

    async def first_of(self, *others: Coroutine) -> None:
        """Return when the engine has died or one of `others` has ended; the rest of them is cancelled."""
        tasks = [asyncio.ensure_future(other) for other in others]
        await asyncio.wait([self._dead, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def asked_to_end(self) -> None:
        await self._once.wait()

    async def asked_again(self) -> None:
        await self._twice.wait()


def _unavailable(message: str) -> Refusal:
    return Refusal(message, status=503, headers={"Retry-After": str(RETRY_SECONDS)})


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

    def __init__(self, server: Server) -> None:
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
        self._server = server
        self.registry.register(self)

    def collect(self):
        """The engine's numbers, for Prometheus's registry."""
        numbers = {} if self._server.backend is None else self._server.backend.numbers()
        for name, help in ENGINE_NUMBERS.items():
            if name in numbers:
                kind = CounterMetricFamily if name == "evictions" else GaugeMetricFamily
                yield kind(f"megatron_dmc_{name}", help, value=numbers[name])


class Server:
    """The handlers of the application, and what they share.

    Attributes:
        backend: `None` until there is one.
        answers: how many are under way.
        closed: why no request is taken, or `None`.
        begun: connections that a request has come by.
    """

    backend: Backend | None = None

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.answers = 0
        self.closed: str | None = "the model is being loaded"
        self._metrics = _Metrics(self)
        self.begun: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
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

    def open(self, backend: Backend) -> None:
        """Let requests in."""
        self.backend, self.closed = backend, None

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
        if request.transport is not None:
            self.begun.add(request.transport)
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
        if self.backend is None:
            raise _unavailable(self.closed)
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
        return await self._answer(request, CompletionShape(self.options.model_name), chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, ChatShape(self.options.model_name), chat=True)

    async def _answer(self, request: web.Request, shape: CompletionShape, *, chat: bool) -> web.StreamResponse:
        arrival = time.perf_counter()
        if self.closed is not None:
            raise _unavailable(self.closed)
        body = await self._body(request)
        job = read_job(body, self.backend, self.options, chat=chat)
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
        finish, end = "stop", self.backend.end if params.termination_id is None else None
        try:
            async with contextlib.aclosing(self.backend.generate(prompt, params)) as pieces:
                async for piece in pieces:
                    if generated == 0:
                        first = time.perf_counter()
                        self._metrics.first_token.observe(first - arrival)
                    generated += len(piece.tokens)
                    self._metrics.generated_tokens.inc(len(piece.tokens))
                    if piece.tokens[-1] == end:
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

    async def _whole(self, shape: CompletionShape, job: Job, deltas: AsyncIterator[Delta]) -> web.Response:
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
        return web.json_response(shape.answer(choices, usage_of(sum(map(len, job.prompts)), sum(generated))))

    async def _streamed(
        self, request: web.Request, shape: CompletionShape, job: Job, deltas: AsyncIterator[Delta]
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
                await send(shape.answer([], usage_of(sum(map(len, job.prompts)), sum(generated)), stream=True))
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


class _Connection(asyncio.Protocol):
    """aiohttp's connection, which would wait for ever for the head of its first request; this one does not."""

    def __init__(self, handler: asyncio.Protocol, server: Server) -> None:
        self._handler, self._server = handler, server
        self.data_received, self.eof_received = handler.data_received, handler.eof_received
        self.pause_writing, self.resume_writing = handler.pause_writing, handler.resume_writing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._handler.connection_made(transport)
        seconds = self._server.options.client_timeout
        self._timer = asyncio.get_running_loop().call_later(seconds, self._check, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._handler.connection_lost(error)

    def _check(self, transport: asyncio.Transport) -> None:
        if transport not in self._server.begun:
            transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            transport.close()


async def run(
    backend: Coroutine[Any, Any, Backend], options: ServerOptions, listener: socket.socket, orders: Orders
) -> bool:
    """Serve until asked to end, or until the engine has died.

    Asked to end, it takes no request any more, and those that run may finish for `drain_seconds`.

    Args:
        backend: what to await for the engine; until then, requests get the status 503.
        options: the server's name and limits.
        listener: the socket that it accepts connections from.
        orders: how it is asked to end, and hears of the engine's death.

    Returns:
        whether the engine is still alive.
    """
    server = Server(options)
    # Requests end with their clients: `handler_cancellation`.
    runner = web.AppRunner(
        server.application(), access_log=None, handler_cancellation=True, keepalive_timeout=30, shutdown_timeout=5
    )
    await runner.setup()
    loop = asyncio.get_running_loop()
    accepting = await loop.create_server(lambda: _Connection(runner.server(), server), sock=listener)
    try:
        opening = asyncio.ensure_future(backend)
        await orders.first_of(_ended(opening), orders.asked_to_end())
        if not opening.done():
            opening.cancel()
            return orders.dead is None
        server.open(opening.result())
        _announce(listener, options)
        return await _serve(server, orders)
    finally:
        accepting.close()
        await runner.cleanup()


async def _ended(task: asyncio.Future) -> None:
    await asyncio.wait([task])


def _announce(listener: socket.socket, options: ServerOptions) -> None:
    address, port = listener.getsockname()[:2]
    if options.api_key is None and not ipaddress.ip_address(address).is_loopback:
        print(
            f"megatron-dmc: warning: everyone who reaches {address} may use this server; set MEGATRON_DMC_API_KEY to "
            "ask for a key",
            file=sys.stderr,
        )
    shown = f"[{address}]" if ":" in address else address
    print(f"megatron-dmc: serving {options.model_name} on http://{shown}:{port}", file=sys.stderr, flush=True)


async def _serve(server: Server, orders: Orders) -> bool:
    """Until the end, and what follows; returns whether the engine is alive."""
    await orders.first_of(orders.asked_to_end())
    if orders.dead is None:
        server.closed = "the server is about to end"
        await orders.first_of(server.idle(), orders.asked_again(), asyncio.sleep(server.options.drain_seconds))
    if orders.dead is None:
        server.abandon("the server has ended")
    else:
        server.closed = orders.dead
        server.abandon(orders.dead)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            await server.idle()
    return orders.dead is None
