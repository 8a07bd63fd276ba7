"""The HTTP server: over an engine that says what a test wants, over the real one, and as a command."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import httpx
import msgpack
import openai
import pytest
import torch
import zmq
from megatron.core.inference.headers import Headers
from runs import ROOT, UNDECIDED, dmc, environment, launcher, train
from test_engine import (
    Letters,
    everything_returned,
    greedy,
    model_of,
    prompts_of,
    restless,  # noqa: F401
    without_cache,
)

from megatron_dmc.commands.serve import end_engine
from megatron_dmc.config import DMCError
from megatron_dmc.front_end import EngineAddress, EngineBackend, _serve, listen
from megatron_dmc.messages import Serving
from megatron_dmc.openai_answers import AnswerText, Tokens
from megatron_dmc.openai_requests import RequestFailed, ServerOptions
from megatron_dmc.ranks import Lifeline, meeting_host
from megatron_dmc.server import Orders, run

END = 256


class Bytes:
    """An engine whose tokens are bytes; it answers `answer`, `step` tokens at a time.

    Attributes:
        seen: prompts and parameters of all requests.
        cancelled: how many were given up.
        proceed: unset, answers stop after their first tokens.
    """

    vocabulary, end, max_sequence_length = 257, END, 100

    def __init__(self, answer="ok", step=1, refuses=None, template=True):
        self.answer, self.step, self.refuses, self.template = answer, step, refuses, template
        self.seen, self.cancelled = [], 0
        self.proceed = threading.Event()
        self.proceed.set()

    def tokenize(self, text):
        return list(text.encode())

    def detokenize(self, tokens):
        return bytes(t for t in tokens if t != END).decode(errors="replace")

    def chat_tokens(self, messages):
        if not self.template:
            raise RequestFailed("the model's tokenizer has no chat template")
        return self.tokenize("".join(f"{m['role']}:{m['content']};" for m in messages))

    async def generate(self, prompt, params):
        self.seen.append((prompt, params))
        if self.refuses:
            raise RequestFailed(self.refuses)
        tokens = [*self.answer.encode(), END][: params.num_tokens_to_generate]
        ended = False
        try:
            for i in range(0, len(tokens), self.step):
                some = tokens[i : i + self.step]
                likely = [{self.detokenize([t]): -0.5, "?": -2.0} for t in some] if params.top_n_logprobs else []
                yield Tokens(list(some), [-0.5] * len(some) if params.return_log_probs else [], likely)
                while not self.proceed.is_set():
                    await asyncio.sleep(0.005)
            ended = True
        finally:
            self.cancelled += not ended

    def numbers(self):
        return dict.fromkeys(
            ("running_requests", "waiting_requests", "compression_ratio", "pages", "free_pages", "evictions"), 7.0
        )


def until(condition):
    """Wait for what must come to pass."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come to pass")


class Told:
    """`Orders` that any thread may give."""

    def __init__(self, orders):
        self._orders, self._loop = orders, asyncio.get_running_loop()

    def end(self):
        self._loop.call_soon_threadsafe(self._orders.end)

    def died(self, reason):
        self._loop.call_soon_threadsafe(self._orders.died, reason)


def serving(client, backend, *, ends=True, **options):
    """What `client` returns, called with the server's address and orders, and whether the engine was alive at the end.

    The server runs meanwhile, and is asked to end after it if `ends`.

    Args:
        backend: the server's `Backend`, or a coroutine of it, which the client does not wait for.
    """

    async def main():
        nonlocal backend
        listener = listen("127.0.0.1", 0)
        loaded = not asyncio.iscoroutine(backend)
        if loaded:
            backend = _itself(backend)
        orders = Orders()
        told = Told(orders)
        address = "http://{}:{}".format(*listener.getsockname())
        served = asyncio.create_task(run(backend, ServerOptions("tiny", **options), listener, orders))

        def when_ready():
            if loaded:  # it listens a little before it says so
                until(lambda: httpx.get(f"{address}/ready").status_code == 200)
            return client(address, told)

        try:
            result = await asyncio.to_thread(when_ready)
        finally:
            if ends:
                orders.end()
            alive = await asyncio.wait_for(served, 60)
        return result, alive

    return asyncio.run(main())


async def _itself(x):
    return x


def post(address, path="/v1/completions", **body):
    return httpx.post(address + path, json={"prompt": "hi"} | body, timeout=60)


def said(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def told(metrics):
    """What /metrics says of the engine, by name."""
    return dict(re.findall(r"^megatron_dmc_(\S+) (\S+)$", metrics, re.MULTILINE))


def chunks(stream):
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]


def test_completions_with_openais_client():
    backend = Bytes("né ok")

    def client(address, orders):
        create = said(address).completions.create
        one = create(model="tiny", prompt="abc", max_tokens=50, temperature=0)
        several = create(model="tiny", prompt=[[1, 2], [3]], n=2, max_tokens=4, top_p=0.5, echo=True)
        scored = create(model="tiny", prompt="abc", max_tokens=50, logprobs=1, temperature=0.5, extra_body={"top_k": 5})
        pieces = list(
            create(model="tiny", prompt="abc", max_tokens=50, stream=True, stream_options={"include_usage": True})
        )
        models = said(address).models.list()
        return one, several, scored, pieces, models

    (one, several, scored, pieces, models), alive = serving(client, backend)
    assert alive and backend.cancelled == 0
    assert one.object == "text_completion" and one.choices[0].text == "né ok" and one.choices[0].finish_reason == "stop"
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.total_tokens) == (3, 7, 10)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert [c.text for c in several.choices] == ["\x01\x02né "] * 2 + ["\x03né "] * 2
    assert {c.finish_reason for c in several.choices} == {"length"}
    assert several.usage.prompt_tokens == 3 and several.usage.completion_tokens == 16
    assert scored.choices[0].logprobs.token_logprobs == [-0.5] * 6
    assert scored.choices[0].logprobs.top_logprobs[0] == {"n": -0.5, "?": -2.0}
    assert "".join(p.choices[0].text for p in pieces[:-1]) == "né ok" and len(pieces) > 4
    assert pieces[-2].choices[0].finish_reason == "stop" and pieces[-1].usage.completion_tokens == 7
    assert [m.id for m in models.data] == ["tiny"]
    greedily, at_half, *_, scored_with, default = [p for _, p in backend.seen]
    assert (greedily.top_k, greedily.top_p, greedily.num_tokens_to_generate) == (1, 0.0, 50)
    assert (at_half.top_k, at_half.top_p, at_half.temperature) == (0, 0.5, 1.0)
    assert (scored_with.top_k, scored_with.top_p, scored_with.temperature) == (5, 0.0, 0.5)
    assert scored_with.skip_prompt_log_probs and scored_with.top_n_logprobs == 1
    assert (default.top_k, default.top_p, default.temperature) == (0, 0.0, 1.0)
    assert [p for p, _ in backend.seen] == [[97, 98, 99], [1, 2], [1, 2], [3], [3], [97, 98, 99], [97, 98, 99]]


def test_chat_with_openais_client():
    backend = Bytes("yes.")
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]

    def client(address, orders):
        create = said(address).chat.completions.create
        inert = dict(
            user="me", metadata={"a": "b"}, store=False, tool_choice="none", parallel_tool_calls=True, stop=None
        )
        one = create(model="tiny", messages=messages, logprobs=True, top_logprobs=2, max_completion_tokens=3, **inert)
        return one, list(create(model="tiny", messages=messages, stream=True, n=2))

    ((one, pieces), _) = serving(client, backend)
    assert backend.seen[0][0] == list(b"system:be;user:ab;")
    choice = one.choices[0]
    assert one.object == "chat.completion" and choice.message.role == "assistant"
    assert choice.message.content == "yes" and choice.finish_reason == "length"
    assert [t.token for t in choice.logprobs.content] == ["y", "e", "s"]
    assert choice.logprobs.content[0].bytes == [121]
    assert {t.token: t.logprob for t in choice.logprobs.content[0].top_logprobs} == {"y": -0.5, "?": -2.0}
    for index in (0, 1):
        deltas = [p.choices[0] for p in pieces if p.choices[0].index == index]
        assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == "stop"
        assert "".join(d.delta.content or "" for d in deltas) == "yes."
    assert backend.seen[1][1].num_tokens_to_generate == 100 - len(backend.seen[1][0])


def test_answers_go_on_after_the_end_of_text_if_asked_to():
    backend = Bytes("ok")

    def client(address, orders):
        return [post(address, max_tokens=3, ignore_eos=ignore).json()["choices"][0] for ignore in (False, True)]

    answers, _ = serving(client, backend)
    assert [(a["text"], a["finish_reason"]) for a in answers] == [("ok", "stop"), ("ok", "length")]
    assert [params.termination_id for _, params in backend.seen] == [None, -1]


@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_stop_words(step):
    """Cut in the text, whatever the tokens, and streamed as unstreamed; what only looks like one is kept."""
    backend = Bytes("one STO two ST€OPPED", step=step)

    def client(address, orders):
        asked = dict(max_tokens=60, stop=["STOP", "€OP"], logprobs=0)
        stream = post(address, stream=True, **asked)
        assert stream.text.endswith("data: [DONE]\n\n")
        return post(address, **asked).json(), chunks(stream.text), post(address, max_tokens=60, stop="ST€").json()

    (whole, pieces, other), _ = serving(client, backend)
    choice = whole["choices"][0]
    assert choice["text"] == "one STO two ST" and choice["finish_reason"] == "stop"
    assert "".join(p["choices"][0]["text"] for p in pieces) == choice["text"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert [t for p in pieces for t in p["choices"][0]["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
    assert choice["logprobs"]["text_offset"] == list(range(14))
    assert other["choices"][0]["text"] == "one STO two "
    assert backend.cancelled == 3  # no need to go on


def test_text_waits_for_whole_characters():
    text = AnswerText(Bytes().detokenize, [])
    euro = list("€".encode())
    assert [text.add(Tokens([byte]))[0] for byte in euro] == ["", "", "€"]
    assert text.add(Tokens(euro[:2]))[0] == "" and text.end()[0] == "\ufffd"


BAD = [
    ({"prompt": None}, "no prompt", "prompt"),
    ({"prompt": ""}, "a prompt is empty", "prompt"),
    ({"prompt": []}, "an empty list", "prompt"),
    ({"prompt": ["a", ""]}, "a prompt is empty", "prompt"),
    ({"prompt": [[]]}, "a prompt is empty", "prompt"),
    ({"prompt": 3}, "prompt must be text", "prompt"),
    ({"prompt": [True]}, "something else", "prompt"),
    ({"prompt": [1, "a"]}, "something else", "prompt"),
    ({"prompt": [1, 257]}, "token 257 of the prompt does not exist: the vocabulary has 257", "prompt"),
    ({"prompt": [-1]}, "token -1", "prompt"),
    ({"prompt": "x" * 100}, "has 100 tokens, at most 99", "prompt"),
    ({"prompt": "\ud800"}, "surrogate", "prompt"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 98; got 0", "max_tokens"),
    ({"max_tokens": 99}, "got 99", "max_tokens"),
    ({"max_tokens": True}, "got true or false", "max_tokens"),
    ({"max_tokens": 5.0}, "got 5.0", "max_tokens"),
    ({"temperature": -1}, "temperature must be a number from 0 to 2", "temperature"),
    ({"temperature": "hot"}, "got a string", "temperature"),
    ({"temperature": True}, "got true or false", "temperature"),
    ({"top_p": 0}, "top_p must be a number above 0", "top_p"),
    ({"top_k": 257}, "top_k must be a whole number from 0 to 256", "top_k"),
    ({"top_k": 5, "top_p": 0.5}, "give either top_k or top_p", "top_k"),
    ({"n": 0}, "n must be a whole number from 1 to 256", "n"),
    ({"n": 257}, "got 257", "n"),
    ({"n": 200, "prompt": ["a", "b"]}, "2 prompts of 200 answers", "n"),
    ({"ignore_eos": 1}, "ignore_eos must be true or false", "ignore_eos"),
    ({"stream": 1}, "stream must be true or false", "stream"),
    ({"stream_options": 1}, "stream_options must be an object", "stream_options"),
    ({"stop": [""]}, "none of them empty", "stop"),
    ({"stop": ["a"] * 17}, "16 strings; got 17", "stop"),
    ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20", "logprobs"),
    ({"logprobs": 1, "echo": True}, "either echo or logprobs", "logprobs"),
    ({"seed": 0}, "seed is not supported: the engine is seeded once", "seed"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
    ({"model": 4}, "model must be a string", "model"),
    ({"tool_choice": "required"}, "tool_choice is not supported", "tool_choice"),
    ({"tempreature": 0}, "there is no field 'tempreature' that this server could follow", "tempreature"),
    ({"min_p": 0.1, "user": "me"}, "there is no field 'min_p'", "min_p"),
    ({"messages": []}, "there is no field 'messages'", "messages"),
]
BAD_CHAT = [
    ({}, "needs messages", "messages"),
    ({"messages": []}, "needs messages", "messages"),
    ({"messages": ["hello"]}, "each message must be an object", "messages"),
    ({"messages": [{"role": "user"}]}, "content of a message must be a string", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of the type text", "messages"),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "needs logprobs", "top_logprobs"),
    ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}, "got 0", "max_completion_tokens"),
]


def test_bad_requests():
    """Each gets a message of its own, and none reaches the engine."""
    backend = Bytes()

    def client(address, orders):
        for body, message, param in BAD:
            answer = httpx.post(f"{address}/v1/completions", content=json.dumps({"prompt": "hi"} | body))
            yield body, answer, message, param
        for body, message, param in BAD_CHAT:
            yield body, httpx.post(f"{address}/v1/chat/completions", json=body), message, param
        for content in (b"{", b"\xff", b"[" * 100_000):
            yield content[:5], httpx.post(f"{address}/v1/completions", content=content), "is not JSON", None
        yield "[]", httpx.post(f"{address}/v1/completions", content=b"[]"), "must be a JSON object; got a list", None

    found, _ = serving(lambda *given: list(client(*given)), backend)
    for body, answer, message, param in found:
        error = answer.json()["error"]
        assert answer.status_code == 400, (body, answer.text)
        assert message in error["message"] and error["param"] == param, (body, error)
        assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert not backend.seen


def test_other_statuses():
    backend = Bytes(template=False)

    def client(address, orders):
        chat = httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        return [
            (404, httpx.get(f"{address}/nothing"), "nothing at this path"),
            (405, httpx.get(f"{address}/v1/completions"), "GET is not allowed here; POST is"),
            (404, post(address, model="huge"), "this server has 'tiny'"),
            (413, post(address, prompt="x" * 3000), "more than 2000 bytes"),
            (400, post(address, prompt="x" * 21), "has 21 tokens, at most 20"),
            (400, post(address, max_tokens=11), "from 1 to 10"),
            (400, chat, "no chat template"),
            (200, httpx.get(f"{address}/health"), "alive"),
            (200, httpx.get(f"{address}/ready"), "ready"),
        ]

    found, _ = serving(client, backend, max_body_bytes=2000, max_prompt_tokens=20, max_new_tokens=10)
    for status, answer, message in found:
        assert answer.status_code == status and message in answer.text, answer.text
        assert status == 200 or message in answer.json()["error"]["message"]
    assert found[1][1].headers["Allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(stream):
    answer, _ = serving(lambda address, _: post(address, stream=stream), Bytes(refuses="too large for the pool"))
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "too large for the pool"


@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_of_the_server_quote_nothing(stream, caplog, monkeypatch):
    async def broken(self, prompt, params):
        raise RuntimeError(f"cannot take {prompt}")
        yield

    monkeypatch.setattr(Bytes, "generate", broken)
    answer, _ = serving(lambda address, _: post(address, prompt=[42], stream=stream), Bytes())
    assert answer.status_code == 500 and "RuntimeError" in caplog.text
    assert "42]" not in caplog.text and "42]" not in answer.text


def test_keys():
    def client(address, orders):
        paths = ("/v1/models", "/metrics", "/nothing", "/health", "/ready")
        without = [httpx.get(address + path).status_code for path in paths]
        with pytest.raises(openai.AuthenticationError) as wrong:
            said(address, "other").models.list()
        assert said(address, "sesame").models.list().data
        return without, wrong.value.body["code"]

    (without, code), _ = serving(client, Bytes(), api_key="sesame")
    assert without == [401, 401, 401, 200, 200] and code == "invalid_api_key"


def test_too_many_requests():
    backend = Bytes()
    backend.proceed.clear()

    def client(address, orders):
        first = threading.Thread(target=post, args=(address,), kwargs=dict(n=2))
        first.start()
        until(lambda: len(backend.seen) == 2)
        refused = post(address, n=2)
        third = threading.Thread(target=post, args=(address,))
        third.start()
        until(lambda: len(backend.seen) == 3)
        backend.proceed.set()
        first.join(), third.join()
        return refused

    refused, _ = serving(client, backend, max_concurrent=3)
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error" and backend.cancelled == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(stream):
    backend = Bytes("x" * 60)
    backend.proceed.clear()

    def client(address, orders):
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(60, read=0.5)) as session:
            body = {"prompt": ["a", "b"], "max_tokens": 60, "stream": stream}
            with session.stream("POST", f"{address}/v1/completions", json=body) as answer:
                answer.read()
        until(lambda: backend.cancelled == 2)
        return httpx.get(f"{address}/metrics").text

    metrics, _ = serving(client, backend)
    assert 'requests_total{endpoint="/v1/completions",status="499"} 1.0' in metrics or stream


def test_time_limits():
    """Of a request as a whole, and of the time that a client may take to send it."""
    backend = Bytes("x" * 60)
    backend.proceed.clear()

    def client(address, orders):
        whole = post(address)
        stream = post(address, stream=True).text
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            slow = slow.recv(1000)
        with socket.create_connection((host, int(port))) as slower:
            slower.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
            return whole, stream, slow, slower.recv(1000) + slower.recv(1000)

    (whole, stream, slow, slower), _ = serving(client, backend, request_timeout=0.3, client_timeout=0.3)
    assert whole.status_code == 504 and "more than 0.3 seconds" in whole.json()["error"]["message"]
    assert "more than 0.3 seconds" in chunks(stream)[-1]["error"]["message"] and "[DONE]" not in stream
    assert slow.startswith(b"HTTP/1.1 408")
    assert slower == b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    assert backend.cancelled == 2


@pytest.mark.parametrize("in_time", [True, False])
def test_drain(in_time):
    """Asked to end, the server refuses what is new; what runs finishes, or is given up when the time is over."""
    backend = Bytes("x" * 60)
    backend.proceed.clear()

    def client(address, orders):
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(address, max_tokens=60)))
        thread.start()
        until(lambda: backend.seen)
        orders.end()
        until(lambda: httpx.get(f"{address}/ready").status_code == 503)
        refused = post(address)
        alive = httpx.get(f"{address}/health").status_code
        if in_time:
            backend.proceed.set()
        thread.join()
        return refused, alive, answers[0]

    (refused, health, answer), alive = serving(client, backend, ends=False, drain_seconds=60 if in_time else 1)
    assert alive and health == 200
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    assert answer.status_code == (200 if in_time else 503)
    assert backend.cancelled == (0 if in_time else 1)


def test_a_dead_engine_ends_the_server():
    backend = Bytes("x" * 60)
    backend.proceed.clear()

    def client(address, orders):
        answers = []
        threads = [
            threading.Thread(target=lambda s=stream: answers.append((s, post(address, stream=s))))
            for stream in (False, True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(backend.seen) == 2)
        time.sleep(0.2)  # for the stream's first chunk
        orders.died("the engine has ended")
        for thread in threads:
            thread.join()
        return dict(answers)

    answers, alive = serving(client, backend, ends=False)
    assert not alive
    assert answers[False].status_code == 503
    assert "the engine has ended" in answers[True].text and "[DONE]" not in answers[True].text


def test_metrics():
    def client(address, orders):
        post(address, prompt="abc")
        post(address, prompt="")
        httpx.get(f"{address}/nothing")
        return httpx.get(f"{address}/metrics")

    answer, _ = serving(client, Bytes("four"))
    lines = answer.text.splitlines()
    assert answer.headers["Content-Type"].startswith("text/plain")
    for line in (
        'requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'requests_total{endpoint="unknown",status="404"} 1.0',
        "prompt_tokens_total 3.0",
        "generated_tokens_total 5.0",
        "time_to_first_token_seconds_count 1.0",
        "time_per_output_token_seconds_count 1.0",
        "compression_ratio 7.0",
        "evictions_total 7.0",
    ):
        assert f"megatron_dmc_{line}" in lines, answer.text


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DMCError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_chat_templates(tmp_path, monkeypatch):
    """A conversation becomes what Hugging Face makes of it, with one token for its beginning."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from megatron_dmc.commands.prepare_data import END_OF_DOCUMENT, train_tokenizer

    train_tokenizer(["a few words"], 260, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    begin = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, begin)]
    )
    tokenizer.chat_template = (
        END_OF_DOCUMENT + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    args = SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path), tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False, trust_remote_code=False, vocab_size=None, rank=1,
        make_vocab_size_divisible_by=1, tensor_model_parallel_size=1, pad_vocab_size=False, vocab_file=None,
        merge_file=None, special_tokens=None, chat_template=None, metadata_path=None, tokenizer_metadata=None,
    )  # fmt: skip
    monkeypatch.setattr("megatron_dmc.front_end.StreamingClient", MagicMock())

    async def backend():
        return EngineBackend(EngineAddress("nowhere", build_tokenizer(args), 64))

    backend = asyncio.run(backend())
    assert backend.tokenize("few") == [begin, *(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("few")))]
    tokens = backend.chat_tokens([{"role": "user", "content": "a few"}])
    assert tokens.count(begin) == 1 and tokens[0] == begin
    assert backend.detokenize(tokens) == "<user>a few<assistant>"
    with pytest.raises(RequestFailed, match="cannot take these messages: a user must begin"):
        backend.chat_tokens([{"role": "system", "content": "be brief"}])


class Unreadable:
    """What is pickled here and cannot be read there, such as a tokenizer of another version."""

    def __reduce__(self):
        return int, ("no number",)


def test_an_engine_that_the_server_cannot_read(capfd):
    ours, theirs = multiprocessing.Pipe()
    ours.send(EngineAddress("tcp://127.0.0.1:1", Unreadable(), 10))
    assert not asyncio.run(_serve(listen("127.0.0.1", 0), ServerOptions("tiny"), theirs))


# Ranks.


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["0", "0"], "127.0.0.1"),
        (["0", "10.0.0.7"], "10.0.0.7"),
        (["0", "10.0.0.7", "10.0.0.8"], "10.0.0.7"),
        (["other", "127.0.0.5"], "127.0.0.1"),  # the address from which 127.0.0.5 is reached
        (["0", None], None),
    ],
)
def test_where_ranks_meet(monkeypatch, others, expected):
    """On loopback if all share it, else where the machines see each other; the first of `others` is this rank."""

    def gather(found, own):
        mine, *rest = others
        first = own if mine == "0" else (("rank 0's", 1), "127.0.0.1")
        found[:] = [first, own if mine == "0" else (own[0], rest[0])]
        found += [own if other == "0" else (("another", 1), other) for other in rest]

    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    if expected is None:
        with pytest.raises(DMCError, match="MASTER_ADDR must be the name or the IPv4 address of rank 0's machine"):
            meeting_host()
    else:
        assert meeting_host() == expected


def test_strangers_are_no_ranks(monkeypatch):
    """Whatever else connects where ranks meet, or says nothing there."""
    port = []

    def broadcast(secret, src):
        (host, number), password = secret[0]
        port.append(number)
        for said in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"", password + struct.pack("!i", 1)):
            opened.append(socket.create_connection((host, number)))
            opened[-1].sendall(said)
            if said == b"":
                opened[-1].close()

    opened = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    lifeline = Lifeline("127.0.0.1")
    assert lifeline.lost is None
    opened[-1].close()
    until(lambda: lifeline.lost == 1)


# The real engine.


def test_through_the_coordinator(megatron, fresh_seed):
    """The same text as from `LLM`, streamed and not; requests given up leave nothing behind."""
    from megatron_dmc.checkpoint import LoadedModel
    from megatron_dmc.llm import LLM, AsyncLLM

    model = model_of()
    args = SimpleNamespace(position_embedding_type="rope", max_position_embeddings=64)
    loaded = LoadedModel(model, Letters(), args, None)
    settings = dict(max_requests=4, max_step_tokens=16, max_sequence_length=60, cache_gib=0.01)
    prompts = [[3, 4, 5], [6] * 20, [1, 2] * 10, [50], [9, 8]]
    expected = LLM(loaded, **settings).generate(prompts, greedy(30))
    texts = [Letters().detokenize(t for t in r.generated_tokens if t != Letters.eod) for r in expected]
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))  # others may end at once
    word = texts[longest][2:4]
    llm = AsyncLLM(loaded, coordinator_host="127.0.0.1", **settings)
    backends = []

    async def backend():
        backends.append(EngineBackend(EngineAddress.of(llm)))
        return backends[0]

    noise = [b"", b"noise", b"\x03", msgpack.packb([999]), msgpack.packb([Headers.SUBMIT_REQUEST.value, 1]),
             msgpack.packb([Headers.ENGINE_REPLY.value, []]), msgpack.packb([Serving.CANCEL.value, "x"])]  # fmt: skip
    try:

        def client(address, orders):
            with zmq.Context() as strangers, strangers.socket(zmq.DEALER) as stranger:
                stranger.connect(llm._coord_runtime.coord_addr)
                for message in noise:
                    stranger.send(message)
                stranger.send_multipart([b"", b"noise"])
            asked = dict(prompt=prompts, max_tokens=30, temperature=0, logprobs=2)
            whole = post(address, **asked).json()
            pieces = chunks(post(address, stream=True, **asked).text)
            stopped = post(address, prompt=prompts[longest], max_tokens=30, temperature=0, stop=word).json()
            refused = post(address, prompt="0" * 61)
            chat = httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "a", "content": "b"}]})
            with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(60, read=0.1)) as session:
                session.post(f"{address}/v1/completions", json={"prompt": ["1"] * 50, "max_tokens": 59, "top_k": 5})
            until(lambda: not llm.engine.requests and not llm.context.total_request_count)
            state = {
                "running_requests": "0.0",
                "waiting_requests": "0.0",
                "free_pages": f"{len(llm.context.cache.pages)}.0",
            }

            def all_told():  # the request given up may come only now, and change the ratio
                now = state | {"compression_ratio": str(llm.context.account.ratio)}
                return now.items() <= told(httpx.get(f"{address}/metrics").text).items()

            until(all_told)
            return whole, pieces, stopped, refused, chat

        (whole, pieces, stopped, refused, chat), alive = serving(client, backend())
        assert alive
        assert [c["text"] for c in whole["choices"]] == texts
        for index, choice in enumerate(whole["choices"]):
            own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
            assert "".join(p["text"] for p in own) == choice["text"]
            for name, values in choice["logprobs"].items():
                found = [v for p in own for v in p["logprobs"][name]]
                assert len(found) == len(values) == len(choice["text"])
                if name in ("token_logprobs", "top_logprobs"):  # rounded by the company that a request had
                    values = [pytest.approx(value, abs=1e-4) for value in values]
                assert found == values
        assert len(pieces) > 2 * len(prompts)
        assert stopped["choices"][0]["text"] == texts[longest][: texts[longest].index(word)]
        assert refused.status_code == 400
        assert chat.status_code == 400 and "no chat template" in chat.json()["error"]["message"]
        assert llm.context.account.ratio > 1
        everything_returned(llm)
    finally:
        for opened in backends:
            opened.close()
        asyncio.run(end_engine(llm))
    assert not llm.engine.inference_coordinator_process.is_alive()


def test_streams_of_requests_that_give_way(megatron, fresh_seed, restless):  # noqa: F811
    """Each token comes once, with its log-probability, and nothing of a stop word."""
    from megatron_dmc.checkpoint import LoadedModel
    from megatron_dmc.llm import AsyncLLM

    model, prompts = model_of(), prompts_of(25, 26, 27, 3, 1, 24, 9)
    args = SimpleNamespace(position_embedding_type="rope", max_position_embeddings=64)
    free = [without_cache(model, prompt, 25) for prompt in prompts]
    words = [found[4:7] for found in free if len(found) > 7]
    expected = [without_cache(model, prompt, 25, words) for prompt in prompts]
    expected = [found[:-3] if found[-3:] in words else found for found in expected]
    llm = AsyncLLM(
        LoadedModel(model, Letters(), args, None), coordinator_host="127.0.0.1", max_requests=4, max_step_tokens=16,
        max_sequence_length=60, cache_gib=0.01,
    )  # fmt: skip

    async def stream(backend, prompt, **changes):
        tokens, log_probs = [], []
        async for piece in backend.generate(prompt, greedy(25, **changes)):
            tokens += piece.tokens
            log_probs += piece.log_probs
        return tokens, log_probs

    async def from_python(prompt):
        tokens = [t async for piece in llm.stream(prompt, greedy(25)) for t in piece.tokens]
        async with contextlib.aclosing(llm.stream(prompt, greedy(25, termination_id=-1))) as given_up:
            async for _ in given_up:
                break
        return tokens

    async def main():
        backend = EngineBackend(EngineAddress.of(llm))
        try:
            assert await asyncio.gather(*map(from_python, prompts)) == free
            await asyncio.to_thread(until, lambda: not llm.engine.requests)  # what is refused next finds it idle
            with pytest.raises(DMCError, match="leave no room for an answer"):
                await anext(llm.stream([1] * 60))
            await asyncio.to_thread(until, lambda: not llm.engine.requests)
            scored = dict(return_log_probs=True, skip_prompt_log_probs=True)
            one = await asyncio.gather(*(stream(backend, prompt, **scored) for prompt in prompts))
            stop = [Letters().detokenize(word) for word in words]
            stopped = await asyncio.gather(*(stream(backend, prompt, stop_words=stop) for prompt in prompts))
            params = greedy(25, termination_id=-1)
            going_on = llm.stream([1], params)
            await anext(going_on)
            assert not hasattr(params, "stream")
            await end_engine(llm)
            for cut in (going_on, llm.stream([1])):
                with pytest.raises(DMCError, match="has been shut down"):
                    async for _ in cut:
                        pass
            return one, stopped
        finally:
            backend.close()
            await end_engine(llm)

    scored, stopped = asyncio.run(main())
    assert [tokens for tokens, _ in scored] == free
    assert [len(log_probs) for _, log_probs in scored] == list(map(len, free))
    assert [tokens for tokens, _ in stopped] == expected
    assert llm.engine.evicted_request_count > 0


# The command.


class Command:
    """A server on a free port: a process of its own, or one for each rank."""

    def __init__(self, *flags, ranks=1):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, launcher(ranks)), "-m", "megatron_dmc", "serve", *map(str, flags),
             "--port", "0", "--cache-gib", "0.05"],
            env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def address(self):
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if found := re.search(r"serving dmc on (http://\S+)", line):
                return found[1]
        raise AssertionError("".join(seen)[-5000:])

    def descendants(self):
        """The processes below, by number, and how they were called."""
        found, seen = {}, [self.process.pid]
        for pid in seen:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    for child in map(int, children.read_text().split()):
                        found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                        seen.append(child)
        return found

    def kill_coordinator(self):
        *_, newest = sorted(pid for pid, line in self.descendants().items() if "spawn_main" in line)
        os.kill(newest, signal.SIGKILL)

    def signal_rank(self, rank, number):
        for pid, line in self.descendants().items():
            if " -m megatron_dmc serve" in line and f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                os.kill(pid, number)
                return
        raise AssertionError(f"there is no rank {rank}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "dmc"
    train("--dmc-stage", "retrofit", *UNDECIDED, "--train-iters", 1, "--save-interval", 1, "--save", folder)
    return folder


@contextlib.contextmanager
def commands(*started):
    try:
        yield started
    finally:
        for command in started:
            below = command.descendants()
            for pid in (*below, command.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            print(command.process.communicate()[0])  # shown where the test fails


def test_command(checkpoint):
    """The same answer as from the command `generate`; it ends well when asked to, and with an error if it must."""
    with commands(Command(checkpoint), Command(checkpoint)) as (asked, bereft):
        printed = dmc("generate", checkpoint, "--prompt", "5 6 7", "--max-new-tokens", 12).output
        first, second = asked.address(), bereft.address()
        assert post(first, prompt="words").json()["error"]["message"] == "the model's tokenizer cannot take this text"
        answer = post(first, prompt="5 6 7", max_tokens=12, temperature=0).json()
        assert f"5 6 7{answer['choices'][0]['text']}\n" in printed
        asked.process.send_signal(signal.SIGTERM)
        assert httpx.get(f"{second}/ready").status_code == 200
        bereft.kill_coordinator()
        assert bereft.process.wait(60) == 1
        assert "coordinator's process has ended" in bereft.process.stdout.read()
        assert asked.process.wait(60) == 0
        assert "Traceback" not in asked.process.stdout.read()


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_ranks(checkpoint, layout):
    """Ranks answer as one process does, give up what clients give up, and end together."""
    sizes = [] if layout == "data" else [f"--{layout}-model-parallel-size", 2]
    asked, endless = dict(max_tokens=12, temperature=0), dict(max_tokens=3900, ignore_eos=True)
    prompts = ["5 6 7", "1 2 3 4 5 6 7 8 9", "50 40", "11"]
    flags = [*sizes, "--max-sequence-length", 4000, "--drain-seconds", 1]
    with commands(Command(checkpoint, *flags, ranks=2)) as (server,):
        printed = dmc(
            "generate", checkpoint, "--max-new-tokens", 12, *(x for prompt in prompts for x in ("--prompt", prompt))
        ).output
        address = server.address()
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda prompt: post(address, prompt=prompt, **asked).json(), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert f"{prompt}{answer['choices'][0]['text']}\n" in printed
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(60, read=0.05)) as session:
            session.post(f"{address}/v1/completions", json={"prompt": ["1"] * 50, **endless})

        def nothing_is_left():
            state = told(httpx.get(f"{address}/metrics").text)
            idle = state["running_requests"] == state["waiting_requests"] == "0.0"
            return idle and state["free_pages"] == state["pages"]

        time.sleep(1)  # until it tells of a state after the cancellation
        until(nothing_is_left)
        assert post(address, prompt=prompts[0], **asked).json()["choices"] == answers[0]["choices"]
        with ThreadPoolExecutor(6) as pool:
            cut = [pool.submit(post, address, prompt="1", **endless) for _ in range(6)]
            until(lambda: told(httpx.get(f"{address}/metrics").text)["running_requests"] == "6.0")
            server.signal_rank(0, signal.SIGTERM)
            output = server.process.communicate(timeout=60)[0]
        assert server.process.returncode == 0 and "Traceback" not in output, output
        assert {answer.result().status_code for answer in cut} == {503}


def test_no_rank_outlives_another(checkpoint):
    flags = [checkpoint, "--tensor-model-parallel-size", 2]
    with commands(Command(*flags, ranks=2), Command(*flags, ranks=2)) as servers:
        addresses = [server.address() for server in servers]
        for rank, server in enumerate(servers):
            server.signal_rank(rank, signal.SIGKILL)
        for rank, server in enumerate(servers):
            output = server.process.communicate(timeout=60)[0]
            assert server.process.returncode != 0
            assert ("rank 1 has died" if rank else "rank 0 has ended, and with it rank 1") in output, output
        for address in addresses:
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{address}/health")


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ([], {}, "no checkpoint at nowhere"),
        (["--port", 70000], {}, "--port must be 0 to 65535; got 70000"),
        (["--max-concurrent", 0], {}, "--max-concurrent must be above 0; got 0"),
        (["--tensor-model-parallel-size", 0], {}, "--tensor-model-parallel-size must be above 0; got 0"),
    ],
)
def test_command_mistakes(flags, variables, message):
    run = dmc("serve", "nowhere", *flags, **variables)
    assert run.code != 0 and message in run.output and "Traceback" not in run.output, run.output


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (dict(tensor_model_parallel_size=3), "tensor_model_parallel_size must divide the model's 2 KV heads; got 3"),
        (dict(pipeline_model_parallel_size=3), "pipeline_model_parallel_size must divide the model's 4 layers; got 3"),
        (dict(tensor_model_parallel_size=2), "need a multiple of 2 processes, and there are 1"),
    ],
)
def test_layouts_that_cannot_be(megatron, checkpoint, layout, message):
    from megatron_dmc.checkpoint import load

    with pytest.raises(DMCError, match=message):
        load(checkpoint, **layout)
