"""What the request models accept, refuse and say."""

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.serving.protocol import ApiError, ChatRequest, CompletionRequest, validation_error

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refuse(kind: Any, body: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return validation_error(list(caught.value.errors()))


def test_harmless_fields_are_ignored() -> None:
    body = CHAT | {"user": "u", "metadata": {"a": 1}, "store": True, "n": 1, "tools": [], "logprobs": False,
                   "presence_penalty": 0, "response_format": {"type": "text"}, "something_new": 1}  # fmt: skip
    request = ChatRequest.model_validate(body)
    assert not hasattr(request, "user")
    assert request.stops == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function"}]), ("presence_penalty", 0.5),
     ("logit_bias", {"5": 1}), ("response_format", {"type": "json_object"}), ("top_k", 5)],
)  # fmt: skip
def test_fields_that_change_the_meaning_are_refused(field: str, value: Any) -> None:
    error = refuse(ChatRequest, CHAT | {field: value})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", 2.5), ("temperature", float("nan")), ("top_p", 1.5), ("max_tokens", 0),
     ("max_tokens", 2.5), ("max_completion_tokens", 0), ("stop", ["a"] * 5), ("stop", ""), ("stop", "x" * 257),
     ("seed", 2**63), ("seed", "one"), ("stream", "yes"), ("model", ""), ("model", None), ("messages", []),
     ("n", 0), ("n", 9), ("n", 1.5), ("logprobs", 1), ("top_logprobs", 21)],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field: str, value: Any) -> None:
    error = refuse(ChatRequest, CHAT | {field: value})
    assert (error.status, error.param) == (400, field)


@pytest.mark.parametrize(
    "message",
    [{"role": "tool", "content": "x"}, {"role": "user"}, {"role": "user", "content": None}, "hi",
     {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
     {"role": "user", "content": "\ud800"}],
)  # fmt: skip
def test_messages_that_are_not_text_are_refused(message: Any) -> None:
    error = refuse(ChatRequest, CHAT | {"messages": [message]})
    assert (error.status, error.param) == (400, "messages")
    assert "passwd" not in error.message


def test_message_parts_and_roles() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief", "name": "x"}, {"role": "user", "content": parts}]
    request = ChatRequest.model_validate(CHAT | {"messages": messages})
    assert [message.for_template() for message in request.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
    ]


def test_newer_name_of_max_tokens_wins() -> None:
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 3}).wanted_tokens == 3
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 3, "max_completion_tokens": 5}).wanted_tokens == 5


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3]])
def test_prompts(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", [None, [], ["a", "b"], [[1], [2]], [-1], [2**40], [True], {"a": 1}])
def test_prompts_that_are_refused(prompt: Any) -> None:
    assert refuse(CompletionRequest, {"model": "m", "prompt": prompt}).param == "prompt"


def test_top_logprobs_need_logprobs() -> None:
    error = refuse(ChatRequest, CHAT | {"top_logprobs": 3})
    assert (error.param, error.code) == ("top_logprobs", "invalid_value")
    assert ChatRequest.model_validate(CHAT | {"logprobs": True}).wanted_logprobs == 0
    assert ChatRequest.model_validate(CHAT | {"logprobs": False, "top_logprobs": 0}).wanted_logprobs is None
    assert refuse(CompletionRequest, {"model": "m", "prompt": "a", "logprobs": 6}).param == "logprobs"
    assert CompletionRequest.model_validate({"model": "m", "prompt": "a", "logprobs": 0}).wanted_logprobs == 0


def test_several_errors_are_counted() -> None:
    assert "(and 1 more)" in refuse(ChatRequest, CHAT | {"temperature": 9, "top_p": 9}).message


def test_a_body_that_is_no_object() -> None:
    assert "JSON object" in refuse(ChatRequest, [1]).message
