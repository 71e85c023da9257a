"""Rows → tokens: what carries loss, what is refused and how, and bytes that do not depend on who read them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import arithmetic_rows, make_tokenizer, write_jsonl

from cluster import data
from cluster.config import DataConfig
from cluster.data import label_set, prepare_tokens, refuse_duplicates
from cluster.errors import DataError
from cluster.rows import IGNORE
from cluster.tokens import TOKENS_FILE, TokenTable, _tokenizer

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config_of(**changes: Any) -> DataConfig:
    return DataConfig(train="", heldout="", **changes)


def prepare(rows: list[Any], tokenizer_dir: Path, out: Path, **changes: Any) -> TokenTable:
    file = write_jsonl(out / "in" / "rows.jsonl", rows)
    prepare_tokens(str(file), tokenizer_dir, config_of(**changes), out, use_ray=False)
    return TokenTable.read(out)


def scored(table: TokenTable, row: int, tokenizer_dir: Path) -> str:
    labels = [int(label) for label in table.labels(row) if label != IGNORE]
    return str(_tokenizer(str(tokenizer_dir)).decode(labels))


def test_chat_scores_every_assistant_turn_with_its_end(tokenizer_dir: Path, tmp_path: Path) -> None:
    table = prepare([{"messages": CHAT}], tokenizer_dir, tmp_path)
    assert scored(table, 0, tokenizer_dir) == "Hello<|im_end|>Ciao<|im_end|>"
    row = table.table.to_pylist()[0]
    assert row["answer"] == "Ciao"
    assert row["prompt"].endswith("Bye<|im_end|>\n<|im_start|>assistant\n")
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    # The ids of the prompt are those of the prompt sent alone.
    assert row["prompt_ids"] == _tokenizer(str(tokenizer_dir))(row["prompt"], add_special_tokens=False)["input_ids"]
    assert table.num_answer_tokens == [11]


def test_completion_scores_the_answer_and_the_end(tokenizer_dir: Path, tmp_path: Path) -> None:
    table = prepare([{"prompt": "1+1=", "completion": "2020-01-01"}], tokenizer_dir, tmp_path)
    assert scored(table, 0, tokenizer_dir) == "2020-01-01<|im_end|>"
    assert table.pairs() == [("1+1=", "2020-01-01")]
    assert table.facts["format"] == "completion"


def test_text_scores_all_but_the_first_token(tokenizer_dir: Path, tmp_path: Path) -> None:
    table = prepare([{"text": "abcdef"}], tokenizer_dir, tmp_path)
    assert scored(table, 0, tokenizer_dir) == "bcdef"
    assert table.pairs() == [("", "abcdef")]


def test_a_long_prompt_loses_its_beginning(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "0123456789" * 3, "completion": "abc"}]
    table = prepare(rows, tokenizer_dir, tmp_path, max_length=10)
    assert _tokenizer(str(tokenizer_dir)).decode(table.input_ids(0)) == "456789abc<|im_end|>"
    assert table.facts["truncated"] == 1
    long = [*CHAT[:2], {"role": "user", "content": "x" * 50}, CHAT[3]]
    kept = prepare([{"messages": long}], tokenizer_dir, tmp_path / "chat", max_length=30)
    assert kept.lengths == [30]
    assert int(kept.input_ids(0)[0]) == 1  # the beginning-of-sequence token stays
    assert scored(kept, 0, tokenizer_dir) == "Ciao<|im_end|>"


BAD: list[tuple[list[Any], dict[str, Any], str]] = [
    (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
        {},
        r"row 2 as completion: the field 'completion' is miss.*fields \['prompt'\]",
    ),
    (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}],
        {},
        r"row 2 as completion: 'completion' is empty",
    ),
    (
        [{"prompt": "a", "completion": "b"}, {"prompt": 3, "completion": "b"}],
        {},
        r"row 2 as completion: 'prompt' is int '3'; allowed is text",
    ),
    (
        [{"prompt": "a", "completion": "0123456789"}],
        {"max_length": 8},
        r"row 1 .*the answer has 11 tokens; with max_length = 8 at most 7 fit",
    ),
    ([{"text": "0123456789"}], {"max_length": 8}, r"'text' has 10 tokens, more than max_length = 8"),
    ([{"question": "a"}], {}, r"row 1: the fields are \['question'\], which is no known format.*chat: messages"),
    ([{"text": "ab"}], {"format": "chat"}, r"row 1 as chat: the field 'messages' is missing"),
    ([{"messages": CHAT[:1]}], {}, r"has the roles \['user'\] and no assistant turn"),
    ([{"messages": CHAT[1:]}], {}, r"begins with an assistant turn"),
    (
        [{"messages": [CHAT[0], {"role": "assistant", "content": [1]}]}],
        {},
        r"row 1 as chat: 'messages\[1\].content' is list",
    ),
    ([{"messages": "Hi"}], {}, r"'messages' is empty or no list"),
    ([["a"]], {}, r"row 1: it is list; allowed is an object"),
    ([{"text": "ab"}, 7], {}, r"row 2: it is int; allowed is an object"),
    ([], {}, r"the data set has no rows"),
]


@pytest.mark.parametrize(("rows", "changes", "message"), BAD)
def test_bad_rows_are_named(
    rows: list[Any], changes: dict[str, Any], message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(rows, tokenizer_dir, tmp_path, **changes)


def test_a_torn_line_and_a_missing_file_are_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ab"}\n{"text": \n')
    with pytest.raises(DataError, match=r"rows.jsonl, row 2: it is no JSON"):
        prepare_tokens(str(file), tokenizer_dir, config_of(), tmp_path, use_ray=False)
    with pytest.raises(DataError, match=r"no file with .jsonl, .json, .parquet is there"):
        prepare_tokens(str(tmp_path / "none*"), tokenizer_dir, config_of(), tmp_path, use_ray=False)


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "plain", chat_template=None)
    with pytest.raises(DataError, match="row 1 as chat: the tokenizer has no chat template; give the rows as 'prompt'"):
        prepare([{"messages": CHAT}], directory, tmp_path)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }};{% endfor %}"
    directory = make_tokenizer(tmp_path / "odd", chat_template=template)
    with pytest.raises(DataError, match="renders turn 1 differently once later turns follow it"):
        prepare([{"messages": CHAT}], directory, tmp_path)


def write_parts(directory: Path) -> list[dict[str, Any]]:
    """The same rows as JSONL files, a JSON array and Parquet."""
    rows = [{**row, "extra": index} for index, row in enumerate(arithmetic_rows(60))]
    write_jsonl(directory / "a.jsonl", rows[:25])
    write_jsonl(directory / "b.jsonl", rows[25:40])
    (directory / "c.json").write_text(json.dumps(rows[40:50]))
    pq.write_table(pa.Table.from_pylist(rows[50:]), directory / "d.parquet")
    return rows


def test_a_directory_is_read_in_the_order_of_its_files(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = write_parts(tmp_path / "in")
    facts = prepare_tokens(str(tmp_path / "in"), tokenizer_dir, config_of(), tmp_path / "out", use_ray=False)
    table = TokenTable.read(tmp_path / "out")
    assert table.pairs() == [(row["prompt"], row["completion"]) for row in rows]
    assert table.table["row"].to_pylist() == list(range(60))
    assert (facts["rows"], facts["tokens"], facts["longest"]) == (60, sum(table.lengths), max(table.lengths))
    prepare_tokens(str(tmp_path / "in" / "*.jsonl"), tokenizer_dir, config_of(), tmp_path / "glob", use_ray=False)
    assert len(TokenTable.read(tmp_path / "glob")) == 40


@pytest.mark.usefixtures("ray_head")
@pytest.mark.filterwarnings("ignore")
def test_ray_data_gives_the_same_bytes(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path / "in")
    asked = []
    by_ray = data._map_with_ray
    monkeypatch.setattr(data, "_map_with_ray", lambda *given: asked.append(given) or by_ray(*given))
    prepare_tokens(str(tmp_path / "in"), tokenizer_dir, config_of(), tmp_path / "few", use_ray=True)
    assert asked == []  # so little is faster here
    monkeypatch.setattr(data, "WORTH_RAY_BYTES", 0)
    for use_ray in (False, True):
        prepare_tokens(str(tmp_path / "in"), tokenizer_dir, config_of(), tmp_path / str(use_ray), use_ray=use_ray)
    assert len(asked) == 1
    assert (tmp_path / "True" / TOKENS_FILE).read_bytes() == (tmp_path / "False" / TOKENS_FILE).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
@pytest.mark.filterwarnings("ignore")
def test_ray_data_names_the_bad_row(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WORTH_RAY_BYTES", 0)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*arithmetic_rows(5), {"prompt": 3, "completion": "x"}])
    with pytest.raises(DataError, match=r"bad.jsonl, row 6 as completion: 'prompt' is int '3'"):
        prepare_tokens(str(bad), tokenizer_dir, config_of(), tmp_path / "bad", use_ray=True)


def test_duplicates_across_the_sets_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    train, heldout = tmp_path / "train", tmp_path / "heldout"
    prepare(arithmetic_rows(10), tokenizer_dir, train)
    prepare(arithmetic_rows(10, offset=8), tokenizer_dir, heldout)
    with pytest.raises(DataError, match=r"2 held-out row\(s\).*training row = held-out row: 9 = 1, 10 = 2\)"):
        refuse_duplicates(train / TOKENS_FILE, heldout / TOKENS_FILE)
    prepare(arithmetic_rows(10, offset=10), tokenizer_dir, heldout)
    refuse_duplicates(train / TOKENS_FILE, heldout / TOKENS_FILE)


def test_label_set(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{index}", "completion": "even" if index % 2 == 0 else "odd"} for index in range(6)]
    prepare(rows, tokenizer_dir, tmp_path)
    config = config_of()
    assert label_set([tmp_path], config) == ["even", "odd"]
    assert label_set([tmp_path], dataclasses.replace(config, labels=["odd", "even", "none"])) == ["odd", "even", "none"]
    with pytest.raises(DataError, match=r"1 answer\(s\) are not among the 1 labels, the first is 'odd'"):
        label_set([tmp_path], dataclasses.replace(config, labels=["even"]))
    prepare(arithmetic_rows(40), tokenizer_dir, tmp_path / "free")
    assert label_set([tmp_path / "free"], config) is None
    prepare([{"text": "ab"}], tokenizer_dir, tmp_path / "text")
    assert label_set([tmp_path / "text"], config) is None
