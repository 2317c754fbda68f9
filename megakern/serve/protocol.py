"""The requests of OpenAI's API that are understood, strictly: what is wrong is said, and nothing is ignored in silence.

Fields that change nothing here (`IGNORED`) are accepted; every other unknown field, and every known one that asks for
what is not there, is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

STOPS = 16  # stop strings of a request, at most
LONGEST_STOP = 1024  # characters
TOP = 20  # likeliest tokens with each log-probability, at most


class RefusedError(Exception):
    """Answered with `status` and OpenAI's form of an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def content(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Generation(_Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Not OpenAI's. 0 and -1: no limit, as elsewhere."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """Not OpenAI's."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None) -> list[str]:
        words = [] if value is None else [value] if isinstance(value, str) else value
        if len(words) > STOPS or not all(0 < len(word) <= LONGEST_STOP for word in words):
            raise ValueError(f"must be at most {STOPS} texts of 1 to {LONGEST_STOP} characters")
        return words

    @field_validator("logit_bias")
    @classmethod
    def _logit_bias(cls, value: dict | None) -> dict | None:
        if value:
            raise ValueError("is not supported here; leave it out")
        return value

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, value: Any) -> Any:
        ignored = cls.ignored()
        return {key: each for key, each in value.items() if key not in ignored} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _streams(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream = true")
        return self

    @classmethod
    def ignored(cls) -> frozenset[str]:
        return IGNORED


IGNORED = frozenset(
    {"store", "metadata", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls"}
)
"""Of clients that send them always; they change nothing in the answer."""


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be 1 or more")
        return self

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported but for the value of n; leave it out")
        if self.suffix is not None:
            raise ValueError("suffix is not supported; leave it out")
        if not self.prompt and not isinstance(self.prompt, str):
            raise ValueError("prompt must be a text, or a list of one or more")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 is for echo = true; else it must be 1 or more")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


def refusal_of(errors: list[dict[str, Any]]) -> RefusedError:
    """What pydantic found, as one error about the first of it."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return RefusedError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', message)}")
    if kind == "extra_forbidden":
        name = ".".join(path)
        return RefusedError(400, f"unknown field {name!r}: this server does not have it", param=name)
    union = [each for each in errors if each["loc"][:2] == first["loc"][:2]]
    if len(union) > 1 and len(first["loc"]) > 2:  # one error for each form that the value might have had
        path = path[:1]
        message = "has none of the forms it may have: " + "; ".join(dict.fromkeys(each["msg"] for each in union))
    name = ".".join(path)
    given = "" if not path or kind == "missing" or len(union) > 1 else f", got {first.get('input')!r:.100}"
    return RefusedError(400, f"{name}: {message}{given}" if path else message, param=name or None)
