"""The server, asked by the official `openai` client and by hand: answers, streams, limits, refusals, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from megakern.config import ConfigError
from megakern.inference import Writer
from megakern.model.sampling import Sampling
from megakern.serve import app, server
from megakern.serve.app import Limits
from tests.serving import Running, serving, tiny_loaded

openai = pytest.importorskip("openai", reason="the client is a dependency of development: pip install megakern[dev]")

SMALL = Limits(max_requests=96, max_tokens=200, max_choices=4, max_body=20_000, body_seconds=1.0)


@pytest.fixture(scope="module")
def running():
    with serving(tiny_loaded(), limits=SMALL) as found:
        yield found


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found:
        yield found
    running.wait_until_free()


def chat_ids(running: Running, *messages: tuple[str, str]) -> list[int]:
    turns = [{"role": role, "content": content} for role, content in messages]
    return running.service.template.encode(turns, running.service.loaded.tokenizer, add_generation_prompt=True)


def alone(running: Running, prompt, max_tokens: int, sampling: Sampling = Sampling(), stop=()) -> tuple[str, str]:  # noqa: B008
    """What the model writes with nothing around it -> text, finish."""
    pieces = list(Writer(running.service.loaded, [prompt], max_tokens=max_tokens, sampling=sampling, stop=stop))
    return "".join(piece.text for piece in pieces), pieces[-1].finish


QUESTION = [("system", "be brief"), ("user", "what is a page?")]
MESSAGES = [{"role": role, "content": content} for role, content in QUESTION]


def test_chat(running, client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=30)
    text, finish = alone(running, chat_ids(running, *QUESTION), 30)
    choice = answer.choices[0]
    assert choice.message.content == text and choice.message.role == "assistant" and choice.finish_reason == finish
    assert len(set(text)) > 5
    assert answer.usage.prompt_tokens == len(chat_ids(running, *QUESTION))
    assert answer.usage.completion_tokens == len(text) + (finish == "stop") and answer.object == "chat.completion"
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "a page?"}]
    again = client.chat.completions.create(
        model="tiny", messages=[MESSAGES[0], {"role": "user", "content": parts}], temperature=0,
        max_completion_tokens=30,
    )  # fmt: skip
    assert again.choices[0].message.content == text


def test_chat_streams(running, client):
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0.8, top_p=0.9, seed=7, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text, finish = alone(running, chat_ids(running, *QUESTION), 40, Sampling(temperature=0.8, top_p=0.9, seed=7))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(pieces) == text and len(pieces) == len(text), "a letter a token"
    assert chunks[-2].choices[0].finish_reason == finish
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(text) + (finish == "stop")


def test_choices_have_seeds_of_their_own_and_the_first_is_that_of_one(client):
    how = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "seed": 5, "temperature": 2}
    three = [choice.text for choice in client.completions.create(n=3, **how).choices]
    assert len(set(three)) == 3
    assert three[0] == client.completions.create(**how).choices[0].text
    streamed = ["", "", ""]
    for chunk in client.completions.create(n=3, stream=True, **how):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == three
    unseeded = {client.completions.create(**{**how, "seed": None}).choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


def test_completions_of_several_prompts(running, client):
    prompts = ["the page", "", "once upon a time"]
    answer = client.completions.create(model="tiny", prompt=prompts, temperature=0)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert (choice.text, choice.finish_reason) == alone(running, prompt, 16), "16 tokens where nothing is asked"
    ids = [list(prompt.encode()) or [256] for prompt in prompts]
    again = client.completions.create(model="tiny", prompt=ids, temperature=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    one = client.completions.create(model="tiny", prompt=ids[0], temperature=0)
    assert one.choices[0].text == answer.choices[0].text


@torch.no_grad()
def test_logprobs_of_completions_with_their_prompt(running, client):
    how = {"model": "tiny", "prompt": "a page", "temperature": 0, "max_tokens": 8, "logprobs": 2, "stop": None}
    choice = client.completions.create(echo=True, **how).choices[0]
    plain = client.completions.create(**how).choices[0]
    assert choice.text == "a page" + plain.text
    table = choice.logprobs
    ids = list("".join(table.tokens).encode())
    values = torch.log_softmax(running.service.loaded.model(torch.tensor([ids]))[0], dim=-1)
    expected = [values[i, token].item() for i, token in enumerate(ids[1:])]
    assert table.token_logprobs[0] is None and table.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert table.text_offset == list(range(len(choice.text))) and table.top_logprobs[0] is None
    best = [
        {chr(token): value for value, token in zip(*map(torch.Tensor.tolist, row.topk(2)), strict=True)}
        for row in values
    ]
    for found, wanted in zip(table.top_logprobs[1:], best, strict=False):
        assert found == pytest.approx(wanted, abs=1e-4)
    assert plain.logprobs.tokens == table.tokens[6:] and plain.logprobs.text_offset[0] == 0
    streamed = list(client.completions.create(stream=True, echo=True, **how))
    tables = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for each in tables for token in each.tokens] == table.tokens
    assert [offset for each in tables for offset in each.text_offset] == table.text_offset
    scored = client.completions.create(**{**how, "max_tokens": 0}, echo=True).choices[0]
    assert scored.text == "a page" and scored.logprobs.token_logprobs[1:] == pytest.approx(expected[:5], abs=1e-4)


def test_logprobs_of_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    found = choice.logprobs.content
    assert "".join(each.token for each in found) == choice.message.content
    for each in found:
        assert each.bytes == list(each.token.encode()) and len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob < 0, "greedy"


def test_stop_strings_end_the_text_and_its_work(running, client):
    whole, _ = alone(running, "once upon a time", 60)
    stop = whole[10:13]
    answer = client.completions.create(
        model="tiny", prompt="once upon a time", temperature=0, max_tokens=60, stop=[stop, "#"], stream=True
    )
    chunks = list(answer)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_penalties_change_the_text(running, client):
    how = {"model": "tiny", "prompt": "once upon a time", "temperature": 0, "max_tokens": 60}
    plain = client.completions.create(**how).choices[0].text
    for more in ({"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1.8}}):
        other = client.completions.create(**how, **more).choices[0].text
        assert other != plain and max(map(other.count, other)) < max(map(plain.count, plain))
    limited = client.completions.create(
        **{**how, "temperature": 5.0, "seed": 1}, extra_body={"top_k": 1}
    )  # fmt: skip
    assert limited.choices[0].text == plain


def test_models(running, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "megakern"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; this server has 'tiny'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'") as error:
        client.completions.create(model="gpt-4", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_64_at_once_are_answered_as_one_by_one(running):
    """Chats and completions, streamed and whole, greedy and drawn, of other lengths each: more than the batch of 32."""

    async def ask(client, i: int) -> str:
        how = {"model": "tiny", "temperature": (0, 1)[i % 2], "seed": i, "max_tokens": 5 + i % 20, "stream": i % 3 == 0}
        prompt = "word " * (i % 7) + str(i)
        if i % 4 < 2:
            found = await client.completions.create(prompt=prompt, **how)
            if how["stream"]:
                return "".join([chunk.choices[0].text async for chunk in found])
            return found.choices[0].text
        found = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **how)
        if how["stream"]:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in found])
        return found.choices[0].message.content

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    found = asyncio.run(ask_all())
    running.wait_until_free()
    for i, text in enumerate(found):
        prompt = "word " * (i % 7) + str(i)
        ids = prompt if i % 4 < 2 else chat_ids(running, ("user", prompt))
        assert text == alone(running, ids, 5 + i % 20, Sampling(temperature=(0, 1)[i % 2], seed=i))[0], i


LONG = {"model": "tiny", "prompt": "a", "temperature": 1, "seed": 3, "max_tokens": 200}


def hold(running: Running, stream: bool, count: int = 1) -> socket.socket:
    """A request for a long text, under way; the caller closes it."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"))
    body = json.dumps({**LONG, "stream": stream, "n": count})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    return connection.sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_pages(running, stream, monkeypatch):
    step = running.service.worker.engine.step
    steps = []

    def slow():
        steps.append(time.sleep(0.03))
        return step()

    monkeypatch.setattr(running.service.worker.engine, "step", slow)
    sockets = [hold(running, stream) for _ in range(3)]
    end = time.monotonic() + 10
    while running.service.worker.open < 3 or running.pool.free == running.pool.count:
        assert time.monotonic() < end
        time.sleep(0.01)
    for each in sockets:
        each.close()
    started = len(steps)
    running.wait_until_free()
    assert len(steps) - started < 60, "200 steps are what the whole texts take"


def test_a_client_that_takes_nothing_is_left(monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.1)
    ended, sent = [], []

    async def events():
        for i in range(100):
            yield b"data: %d" % i

    async def never():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if len(sent) == 4:
            await never()

    asyncio.run(app.EventStream(events(), lambda: ended.append(len(sent)))({}, never, send))
    assert ended == [4]


def post(url: str, body: bytes | dict, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
WRONG = [
    ({"max_tokens": "3"}, "max_tokens", "max_tokens: Input should be a valid integer, got '3'"),
    ({"max_tokens": True}, "max_tokens", "valid integer, got True"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0, got -1"),
    ({"max_tokens": 201}, "max_tokens", "max_tokens must be at most 200 on this server, got 201"),
    ({"max_tokens": 0}, None, "max_tokens = 0 is for echo = true; else it must be 1 or more"),
    ({"max_tokens": 0, "echo": True}, "max_tokens", "max_tokens = 0 is for echo with logprobs"),
    ({"temperature": -0.5}, "temperature", "greater than or equal to 0, got -0.5"),
    ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number, got 'hot'"),
    ({"top_p": 0}, "top_p", "top_p: Input should be greater than 0"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"n": 0}, "n", "n: Input should be greater than or equal to 1, got 0"),
    ({"n": 5}, "n", "1 prompts x n = 5 are more than the 4 texts that one request may ask for"),
    ({"stop": ["a"] * 17}, "stop", "stop: must be at most 16 texts of 1 to 1024 characters"),
    ({"stop": ""}, "stop", "must be at most 16 texts of 1 to 1024"),
    ({"stream": "yes"}, "stream", "stream: Input should be a valid boolean"),
    ({"stream_options": {"include_usage": True}}, None, "stream_options is for stream = true"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias", "logit_bias: is not supported here"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20, got 21"),
    ({"best_of": 3}, None, "best_of is not supported"),
    ({"suffix": "z"}, None, "suffix is not supported"),
    ({"temprature": 1}, "temprature", "unknown field 'temprature': this server does not have it"),
    ({"prompt": 5}, "prompt", "prompt: has none of the forms it may have"),
    ({"prompt": []}, None, "prompt must be a text, or a list of one or more"),
    ({"prompt": [300]}, "prompt", "token id 300 is out of range, the tokenizer has 257 ids"),
    ({"prompt": "a" * 510}, "prompt", "the 510 tokens of the prompt and the 3 to write are more than this model's 512"),
    ({"model": None}, "model", "model: Input should be a valid string"),
    ({"seed": 2**63}, "seed", "seed: Input should be less than"),
]  # fmt: skip
WRONG_CHAT = [
    ({"messages": []}, "messages", "messages: List should have at least 1 item"),
    ({"messages": "hello"}, "messages", "messages: Input should be a valid list"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content: Field required"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages", "a role must be system, user or assistant, got"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "none of the forms"),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages", "more than this model's 512; shorten"),
    ({"tools": []}, "tools", "unknown field 'tools'"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "Input should be 'text'"),
    ({"top_logprobs": 2}, None, "top_logprobs is for logprobs = true"),
    ({"max_completion_tokens": 3}, None, "max_tokens and max_completion_tokens mean the same"),
    ({"max_tokens": 0}, None, "max_tokens must be 1 or more"),
]  # fmt: skip


def test_what_is_malformed_is_refused_with_the_reason(running):
    for path, good, table in (("/v1/completions", GOOD, WRONG), ("/v1/chat/completions", CHAT, WRONG_CHAT)):
        assert post(running.url, good, path)[0] == 200
        for change, param, message in table:
            status, answer = post(running.url, {**good, **change}, path)
            error = answer["error"]
            assert status == 400 and message in error["message"], (change, status, error)
            assert error["param"] == param and error["type"] == "invalid_request_error", (change, error)
    too_long = post(running.url, {**GOOD, "prompt": "a" * 510})[1]["error"]
    assert too_long["code"] == "context_length_exceeded"
    without = {key: value for key, value in GOOD.items() if key != "model"}
    assert post(running.url, without)[1]["error"]["message"] == "model: Field required"
    running.wait_until_free()


def test_what_clients_send_always_is_accepted(running):
    harmless = {
        "store": False,
        "metadata": {"a": "b"},
        "user": "me",
        "service_tier": "auto",
        "logit_bias": {},
        "n": None,
    }
    assert post(running.url, {**CHAT, **harmless}, "/v1/chat/completions")[0] == 200


def test_what_is_no_request_at_all(running):
    status, answer = post(running.url, b"{")
    assert status == 400 and "the body is not JSON" in answer["error"]["message"]
    status, answer = post(running.url, b"[1]")
    assert status == 400
    status, answer = post(running.url, GOOD, content_type="text/plain")
    assert status == 400, "a form of another site can send this without asking the browser"
    status, answer = post(running.url, GOOD, "/v1/nothing")
    assert status == 404 and answer["error"]["message"] == "POST /v1/nothing: Not Found"
    status, answer = post(running.url, GOOD, "/v1/models")
    assert status == 405
    status, answer = post(running.url, GOOD, host="evil.example")
    assert (
        status == 421
        and "answers to localhost, 127.0.0.1, [::1], not to the host 'evil.example'" in answer["error"]["message"]
    )


NASTY = [
    b"", b"null", b'"a"', b"[" * 5000, b'{"a":' * 3000, b'\xff\xfe{"model"',
    *(
        b'{"model": "tiny", ' + rest + b"}"
        for rest in (
            b'"prompt": "a", "max_tokens": 1' + b"0" * 5000, b'"prompt": "a", "temperature": NaN',
            b'"prompt": "a", "top_p": 1e999', b'"prompt": "a", "\\ud800": 1', b'"prompt": "\\ud800"',
            b'"prompt": [[], "a"]', b'"prompt": [true]', b'"prompt": [-1]',
            b'"prompt": [123456789012345678901234567890]', b'"prompt": "a", "max_tokens": 1.5', b'"stream": true',
            b'"prompt": "a", "logit_bias": {"a": "b"}', b'"prompt": {"a": 1}', b'"model": "\\ud800", "prompt": "a"',
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_body_breaks_the_server(running, path):
    for body in NASTY:
        status, answer = post(running.url, body, path)
        assert status == 400 or (status == 404 and b"ud800" in body), (body[:80], status, answer)
        assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    chats = [
        {"role": "user", "content": "\ud800"}, {"role": "\ud800", "content": "a"}, {"role": "user"},
        {"role": "user", "content": "\ufdd0"}, {"role": "user", "content": None}, [], 5,
        {"role": "user", "content": "a", "tool_calls": []},
    ]  # fmt: skip
    for message in chats:
        status, answer = post(running.url, {**CHAT, "messages": [message]}, "/v1/chat/completions")
        assert status == 400, (message, answer)
    running.wait_until_free()


def test_large_and_slow_bodies(running):
    status, answer = post(running.url, {**GOOD, "prompt": "a" * 30_000})
    assert (
        status == 413
        and answer["error"]["message"] == "the body is larger than the 20,000 bytes that this server takes"
    )

    def raw(head: str, *parts: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1])), timeout=10) as link:
            link.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{head}\r\n\r\n".encode())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in parts:
                    link.sendall(part)
            return link.makefile("rb").readline()

    chunk = b"4000\r\n" + b"a" * 0x4000 + b"\r\n"
    assert b" 413 " in raw("transfer-encoding: chunked", chunk, chunk, chunk), "no length is told"
    assert b" 408 " in raw("content-length: 100", b"{")


def test_too_many_texts(running, client):
    """96 at a time: the next one is told to come again, and comes through when they are done."""
    pause = running.service.worker._lock  # no text can end while it is held
    with pause:
        running.service.worker._open.update(object() for _ in range(95))
    with pytest.raises(
        openai.RateLimitError, match="writes 95 texts of 96 that it takes at a time; 2 more do not fit"
    ) as error:
        client.completions.create(n=2, **GOOD)
    assert error.value.response.headers["retry-after"] == "1" and error.value.code == "rate_limit_exceeded"
    assert client.completions.create(**GOOD).choices[0].text
    with pause:
        running.service.worker._open.clear()
    assert len(client.completions.create(n=2, **GOOD).choices) == 2


def test_health(running):
    with urllib.request.urlopen(f"{running.url}/health") as answer:
        assert json.loads(answer.read()) == {"status": "ok", "open": 0, "pages": 256, "free_pages": 256}


def test_the_bearer_token():
    secret = "a-secret-of-some-length"
    with serving(tiny_loaded(), token=secret) as running:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": secret},
            {"authorization": "Basic " + secret},
        ):
            status, answer = post(running.url, GOOD, **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key", headers
        assert post(running.url, GOOD, authorization=f"bearer {secret}")[0] == 200
        assert post(running.url, GOOD, authorization=f"Bearer {secret}", host="any.name")[0] == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=secret) as client:
            assert client.models.list().data[0].id == "tiny"
        for path in ("/", "/health"):
            with urllib.request.urlopen(running.url + path) as answer:
                assert answer.status == 200


def test_an_engine_that_fails_is_said_and_never_hangs():
    with serving(tiny_loaded()) as running:

        def broken():
            raise RuntimeError("out of memory")

        running.service.worker.engine.step = broken
        for stream in (False, True):
            with (
                openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
                pytest.raises(openai.APIError, match="the engine has failed: RuntimeError: out of memory"),
            ):
                list(client.completions.create(**GOOD, stream=stream))
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{running.url}/health")
        assert error.value.code == 503 and json.loads(error.value.read())["status"] == "failed"


def test_addresses_and_tokens(tmp_path):
    assert server.is_loopback("127.0.0.1") and server.is_loopback("::1") and server.is_loopback("localhost")
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.com"):
        with pytest.raises(ConfigError, match=f"--host {host} can be reached from other machines: guard it with"):
            server.check_address(host, None)
        server.check_address(host, "a" * 16)
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match="token: cannot be read"):
        server.read_token(file)
    file.write_text("short\n")
    with pytest.raises(
        ConfigError, match="a token must have 16 characters or more and no spaces, got 5; make one with"
    ):
        server.read_token(file)
    file.write_text("a" * 20 + "\n")
    assert server.read_token(file) == "a" * 20 and server.read_token(None) is None
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {port}: .*in use"):
            server.listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="max_requests must be 1 or more, got 0"):
        Limits(max_requests=0)


def test_the_cache_takes_what_memory_allows(monkeypatch):
    loaded = tiny_loaded()
    each = 2 * 2 * 2 * 16 * 4  # keys and values x layers x heads x head dim x bytes
    monkeypatch.setattr(server, "_available_memory", lambda: 4 * 1000 * each)
    assert server.cache_tokens(loaded, 1) == 512 and server.cache_tokens(loaded, 64) == 1000


def test_memory_is_known_on_systems_without_proc(monkeypatch):
    total = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < server._available_memory() <= total
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert server._available_memory() == pytest.approx(total / 2, rel=0.1)
