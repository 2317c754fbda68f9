"""The HTTP application: OpenAI's chat completions, completions and models; /health; a chat page at /."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from megakern.config import ConfigError, require
from megakern.data.chat import ChatTemplate
from megakern.data.files import DataError
from megakern.inference import Loaded
from megakern.model.engine import Request
from megakern.model.sampling import Sampling
from megakern.parallel.random import fold
from megakern.serve.answers import DONE, ChatAnswer, CompletionAnswer, event, usage
from megakern.serve.guard import Guard
from megakern.serve.protocol import ChatRequest, CompletionRequest, RefusedError, refusal_of
from megakern.serve.worker import ClosedError, Delta, FullError, Job, Worker

PAGE = Path(__file__).with_name("page.html")
SEND_SECONDS = 60.0  # that a client may take nothing of what is written to it, before its connection is closed
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes. Raises ConfigError for a value below 1."""

    max_requests: int = 256
    """Texts that are open at a time, waiting ones included; one more is answered with 429."""
    max_tokens: int = 4096
    """New tokens of one text at most."""
    max_choices: int = 16
    """Texts that one request may ask for: prompts x n."""
    max_body: int = 4 << 20
    """Bytes of a request."""
    body_seconds: float = 20.0
    """Time in which all of them must have come."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens", "max_choices", "max_body"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")


class Service:
    """From a checked request to jobs of the worker, and from their text to an answer."""

    def __init__(self, loaded: Loaded, template: ChatTemplate, worker: Worker, *, name: str, limits: Limits) -> None:
        self.loaded, self.template, self.worker, self.name, self.limits = loaded, template, worker, name, limits
        self.started = int(time.time())

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(
                404, f"there is no model {name[:100]!r}; this server has {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        try:
            messages = [message.plain() for message in body.messages]
            ids = self.template.encode(messages, self.loaded.tokenizer, add_generation_prompt=True)
        except (ConfigError, DataError) as error:
            raise RefusedError(400, str(error), param="messages") from error
        asked = (body.top_logprobs or 0) if body.logprobs else None
        requests = self._requests([ids], body, most=body.most, logprobs=asked)
        return await self._answer(
            requests, body, http, ChatAnswer(self.name, self.loaded.tokenizer, bool(body.logprobs))
        )

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        tokenizer, prompts = self.loaded.tokenizer, body.prompts()
        echo = bool(body.echo)
        try:
            ids = [tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]
            ids = [each or [tokenizer.eod] for each in ids]
            texts = [
                (own, each if isinstance(each, str) else tokenizer.decode(each))
                for own, each in zip(ids, prompts, strict=True)
                for _ in range(body.n or 1)
            ]
        except DataError as error:
            raise RefusedError(400, str(error), param="prompt") from error
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        scored = echo and body.logprobs is not None
        if most == 0 and not scored:
            raise RefusedError(400, "max_tokens = 0 is for echo with logprobs", param="max_tokens")
        requests = self._requests(ids, body, most=most, logprobs=body.logprobs, prompt_logprobs=scored)
        how = {"logprobs": body.logprobs is not None, "echo": echo, "prompts": texts}
        return await self._answer(requests, body, http, CompletionAnswer(self.name, tokenizer, **how))

    def _requests(
        self, prompts: list[list[int]], body, *, most: int | None, logprobs: int | None, prompt_logprobs: bool = False
    ) -> list[Request]:
        """One for each prompt and each of its n choices. Raises RefusedError."""
        n = body.n or 1
        if len(prompts) * n > self.limits.max_choices:
            raise RefusedError(
                400, f"{len(prompts)} prompts x n = {n} are more than the {self.limits.max_choices} texts that one "
                "request may ask for", param="n",
            )  # fmt: skip
        if most is not None and most > self.limits.max_tokens:
            raise RefusedError(
                400,
                f"max_tokens must be at most {self.limits.max_tokens} on this server, got {most}",
                param="max_tokens",
            )
        longest = self.loaded.config.model.sequence_length
        for ids in prompts:
            if len(ids) + (1 if most is None else most) > longest:
                asked = "" if most is None else f" and the {most} to write"
                raise RefusedError(
                    400, f"the {len(ids)} tokens of the prompt{asked} are more than this model's {longest}; shorten "
                    "the prompt, or ask for fewer", param="messages" if isinstance(body, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )  # fmt: skip
        seed = secrets.randbits(63) if body.seed is None else body.seed
        options = {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k if (body.top_k or 0) > 0 else None,
            "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
        }
        return [
            Request(
                prompt=tuple(ids),
                max_new_tokens=min(self.limits.max_tokens, longest - len(ids)) if most is None else most,
                sampling=Sampling(**options, seed=seed if choice == 0 else fold(seed, "choice", choice)),
                stop_tokens=self.loaded.stop_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for ids in prompts
            for choice in range(n)
        ]

    async def _answer(self, requests: list[Request], body, http: HttpRequest, form) -> Response:
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver_to(index: int):
            return lambda delta: loop.call_soon_threadsafe(deltas.put_nowait, (index, delta))

        jobs = [Job(self.loaded, each, tuple(body.stop or ()), deliver_to(i)) for i, each in enumerate(requests)]
        try:
            self.worker.submit(jobs)
        except ConfigError as error:
            raise RefusedError(400, str(error)) from error
        except FullError as error:
            raise RefusedError(429, str(error), code="rate_limit_exceeded") from error
        except ClosedError as error:
            raise RefusedError(503, str(error)) from error
        prompt_tokens = sum(len(each.prompt) for each in requests[:: body.n or 1])
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(len(jobs), deltas, form, prompt_tokens if with_usage else None)
            return EventStream(events, at_end=lambda: self.worker.cancel(jobs))
        try:
            choices = await _unless_gone(_collect(len(jobs), deltas), http)
        finally:
            self.worker.cancel(jobs)
        if choices is None:
            return Response(status_code=499)  # nobody reads it
        failed = next((each[-1] for each in choices if each[-1].finish == "error"), None)
        if failed is not None:
            raise RefusedError(503, failed.text)
        counts = usage(prompt_tokens, sum(each[-1].tokens for each in choices))
        return JSONResponse(form.whole(choices, counts))

    async def _events(self, count: int, deltas, form, prompt_tokens: int | None) -> AsyncIterator[bytes]:
        made, left = [0] * count, count
        if isinstance(form, ChatAnswer):
            for index in range(count):
                yield event(form.opening(index))
        while left:
            index, delta = await deltas.get()
            if delta.finish == "error":
                yield event(RefusedError(503, delta.text).content())
                return
            made[index] = delta.tokens
            left -= delta.finish is not None
            for chunk in form.chunks(index, delta):
                yield event(chunk)
        if prompt_tokens is not None:
            yield event(form.last(usage(prompt_tokens, sum(made))))
        yield DONE


async def _collect(count: int, deltas: asyncio.Queue[tuple[int, Delta]]) -> list[list[Delta]]:
    choices: list[list[Delta]] = [[] for _ in range(count)]
    left = count
    while left:
        index, delta = await deltas.get()
        choices[index].append(delta)
        left -= delta.finish is not None
    return choices


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(work, http: HttpRequest):
    """What `work` returns, or None when the client has gone before."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(http.receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class EventStream(Response):
    """Server-sent events, which end when the client has gone, at once and not with the next event; then `at_end`."""

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        self.at_end = at_end
        self.events, self.status_code, self.background = events, 200, None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send) -> None:
        async def send_soon(message) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        async def run() -> None:
            await send_soon({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.events:
                await send_soon({"type": "http.response.body", "body": part, "more_body": True})
            await send_soon({"type": "http.response.body", "body": b"", "more_body": False})

        tasks = [asyncio.ensure_future(run()), asyncio.ensure_future(_gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                # The client has gone while it was written to, or takes nothing any more.
                with contextlib.suppress(OSError, asyncio.TimeoutError):
                    tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.events.aclose()
            self.at_end()  # here and not in the generator, which may never have started


def page_and_policy() -> tuple[str, str]:
    """The chat page, and a content security policy that allows what is in it, this server, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    rules = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in rules.items())


def create_app(service: Service, *, token: str | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The application of `service`. token, hosts: see `Guard`. Its end closes the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI):
        yield
        await asyncio.to_thread(service.worker.close)

    # Its own documentation pages load scripts from elsewhere.
    app = FastAPI(title="megakern", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    limits = service.limits
    page, policy = page_and_policy()

    @app.exception_handler(RefusedError)
    async def refused(_request: HttpRequest, error: RefusedError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.content(), status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        found = refusal_of(list(error.errors()))
        return JSONResponse(found.content(), status_code=found.status)

    @app.exception_handler(HTTPException)
    async def unknown(request: HttpRequest, error: HTTPException) -> JSONResponse:
        found = RefusedError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
        return JSONResponse(found.content(), status_code=error.status_code, headers=error.headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        return await service.complete(body, request)

    def described() -> dict[str, object]:
        return {"id": service.name, "object": "model", "created": service.started, "owned_by": "megakern"}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, object]:
        service.check_model(name)
        return described()

    @app.get("/health")
    async def health() -> Response:
        broken = service.worker.failure is not None
        state = {"status": "failed" if broken else "ok", "open": service.worker.open}
        pool = service.worker.engine.pool
        state |= {"pages": pool.count, "free_pages": pool.free}
        return Response(json.dumps(state), status_code=503 if broken else 200, media_type="application/json")

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    app.add_middleware(Guard, token=token, hosts=hosts, max_body=limits.max_body, body_seconds=limits.body_seconds)
    return app
