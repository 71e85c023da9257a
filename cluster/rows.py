"""One row of text → token ids and labels; pure, given a tokenizer.

The answer's tokens carry the loss. Text and answer are tokenised apart, so that the prompt of a training row has the
same ids as the prompt that is later sent to the served model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RowFormat = Literal["chat", "completion", "text"]

#: The fields that make a row one of a format; `auto` takes the first format whose fields are all there.
FIELDS: dict[RowFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}

IGNORE = -100


class RowProblem(Exception):
    """What is wrong with one row; the reader adds the file and the row number."""


@dataclass(frozen=True)
class EncodedRow:
    """A row as tokens: `labels` equals `input_ids` where there is loss and is −100 elsewhere (not shifted)."""

    input_ids: list[int]
    labels: list[int]
    prompt: str
    prompt_ids: list[int]
    answer: str
    truncated: bool

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that are predicted and scored; the first token of a row has nothing before it."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class _Segment:
    text: str
    is_answer: bool


def detect_format(fields: Iterable[str]) -> RowFormat | None:
    """The format of a row with these (non-null) fields, or None."""
    present = set(fields)
    return next((name for name, needed in FIELDS.items() if present.issuperset(needed)), None)


def encode_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, max_length: int
) -> EncodedRow:
    """Tokenise one row.

    Args:
        row: Its fields.
        tokenizer: The model's own.
        row_format: Which fields to read.
        max_length: Longest row in tokens; a longer prompt loses its beginning.

    Raises:
        RowProblem: a field is missing, empty or of the wrong type, or the answer alone is too long.
    """
    for name in FIELDS[row_format]:
        if row.get(name) is None:
            raise RowProblem(f"the field {name!r} is missing")
    if row_format == "chat":
        return _encode_chat(row["messages"], tokenizer, max_length)
    values = {name: _text(row[name], name) for name in FIELDS[row_format]}
    if row_format == "text":
        return _encode_text(values["text"], tokenizer, max_length)
    return _encode_completion(values["prompt"], values["completion"], tokenizer, max_length)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"{name!r} is {type(value).__name__} {str(value)[:40]!r}; allowed is text")
    if not value.strip():
        raise RowProblem(f"{name!r} is empty")
    return value


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRow:
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    if len(ids) < 2:
        raise RowProblem(f"'text' has {len(ids)} token(s); at least 2 are needed to predict one from the other")
    if len(ids) > max_length:
        raise RowProblem(f"'text' has {len(ids)} tokens, more than max_length = {max_length}")
    return EncodedRow(ids, [IGNORE, *ids[1:]], "", [], text, truncated=False)


def _encode_completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRow:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise RowProblem("the tokenizer has no end-of-sequence token, so that no answer could ever end")
    prompt_ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    prompt_ids = prompt_ids[:-1] if len(prompt_ids) > 1 and prompt_ids[-1] == eos else prompt_ids
    answer = [*_plain(completion, tokenizer), int(eos)]
    return _assemble([(prompt_ids, False), (answer, True)], prompt, completion, tokenizer, max_length)


def _encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRow:
    turns = _turns(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise RowProblem("the tokenizer has no chat template; give the rows as 'prompt' and 'completion'")
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    segments = _chat_segments(turns[: last + 1], tokenizer)
    parts = [(_plain(segment.text, tokenizer), segment.is_answer) for segment in segments]
    prompt = "".join(segment.text for segment in segments[:-1])
    return _assemble(parts, prompt, turns[last]["content"], tokenizer, max_length)


def _turns(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowProblem("'messages' is empty or no list of {role, content}")
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowProblem(f"'messages[{number}]' is no {{role, content}}")
        role = str(message["role"])
        turns.append({"role": role, "content": _text(message.get("content"), f"messages[{number}].content")})
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise RowProblem(f"'messages' has the roles {roles} and no assistant turn to learn from")
    if roles[0] == "assistant":
        raise RowProblem("'messages' begins with an assistant turn; put a user turn before it")
    return turns


def _chat_segments(turns: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[_Segment]:
    """Cut the rendered conversation into prompts and answers by rendering every prefix that ends at an answer.

    This needs no generation markers in the template. White space after the end-of-turn token is the template's
    separator and carries no loss.
    """
    segments: list[_Segment] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:index], generate=True)
        after = _render(tokenizer, turns[: index + 1], generate=False)
        if not before.startswith(done) or not after.startswith(before):
            raise RowProblem(
                f"the chat template renders turn {index} differently once later turns follow it; "
                "cut the conversation to its last turn or give it as 'prompt' and 'completion'"
            )
        answer = after[len(before) :].rstrip()
        segments += [_Segment(before[len(done) :], False), _Segment(answer, True)]
        done = before + answer
    return segments


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, generate: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        raise RowProblem(f"the chat template refuses the conversation ({error})") from error


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _assemble(
    parts: Sequence[tuple[list[int], bool]],
    prompt: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> EncodedRow:
    ids = [token for tokens, _ in parts for token in tokens]
    labels = [token if is_answer else IGNORE for tokens, is_answer in parts for token in tokens]
    last = len(parts[-1][0])
    if last >= max_length:
        raise RowProblem(f"the answer has {last} tokens; with max_length = {max_length} at most {max_length - 1} fit")
    truncated = len(ids) > max_length
    if truncated:
        # The beginning-of-sequence token stays first: models lean on it as an attention sink.
        keep = [ids[0]] if ids[0] == tokenizer.bos_token_id and last + 1 < max_length else []
        cut = len(ids) - max_length + len(keep)
        ids, labels = keep + ids[cut:], [IGNORE] * len(keep) + labels[cut:]
    labels[0] = IGNORE
    return EncodedRow(ids, labels, prompt, ids[: len(ids) - last], answer, truncated)
