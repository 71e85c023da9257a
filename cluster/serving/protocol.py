"""OpenAI's chat.completions and completions as pydantic models, and its error shape.

Fields that cannot change the answer (`user`, `metadata` ...) are accepted and ignored; fields that would change its
meaning and are not supported are refused with 400 unless they hold their neutral value.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_BODY_BYTES = 2 * 1024 * 1024
_MAX_MESSAGES = 4096
_MAX_STOPS = 4
_MOST_CHOICES = 8
_MAX_STOP_CHARS = 256

Text = Annotated[str, Field(max_length=MAX_BODY_BYTES)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "ignore_eos": (None, False),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_k": (None, 0, -1),
}
"""Fields that are not supported, with the values that ask for nothing."""


class ApiError(Exception):
    """An answer in OpenAI's error shape; `headers` go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        """The body as bytes."""
        return json.dumps(self.body()).encode()


class RefusedField(ValueError):
    """A field, named by `param`, whose value is not supported or does not fit the others."""

    def __init__(self, param: str, message: str, code: str) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(_Lenient):
    """One part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(_Lenient):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=_MAX_MESSAGES)]

    def for_template(self) -> dict[str, str]:
        """Role and plain text; templates know `system`, not OpenAI's newer `developer`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(_Lenient):
    """Options of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(_Lenient):
    """What both routes share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, neutral in _NEUTRAL.items():
                if name in data and data[name] not in neutral:
                    raise RefusedField(name, f"`{name}` is not supported here; leave it out.", "unsupported_parameter")
        return data

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """The limit the client asked for."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens come with every token, and its own log-probability; null for neither."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_as_it_goes(self) -> bool:
        """Whether every event of a stream tells the usage so far, as vLLM's option has it."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RefusedField("top_logprobs", "`top_logprobs` needs `logprobs: true`.", "invalid_value")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions; `prompt` is one text (a list of one is unpacked) or one list of token ids."""

    prompt: (
        Text | Annotated[list[Text], Field(min_length=1, max_length=1)] | Annotated[list[TokenId], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """`logprobs`."""
        return self.logprobs


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage record."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def validation_error(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors as 400. What the client sent is never repeated."""
    first: dict[str, Any] = errors[0] if errors else {"loc": (), "msg": "the request is not valid", "type": ""}
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, RefusedField):
        return ApiError(400, str(cause), param=cause.param, code=cause.code)
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return ApiError(400, "The body must be a JSON object, sent with `Content-Type: application/json`.")
    message = f"{'.'.join(path)}: {first['msg']}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return ApiError(400, message, param=path[0], code="invalid_value")
