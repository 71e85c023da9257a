"""`rankline chat` against the real routes and engine: for scripts, with given lines, and at a real terminal.

`tiny` is the model of the other tests with its two adapters. `parrot` is a Llama whose weights make it say what a
question's last character stands for: "a" is answered "bcd", digits are counted on for ever, "!" attacks the terminal.
"""

import copy
import json
import logging
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_samples import ATTACK, COMMAND, TOKEN, Served, Terminal, make_parrot, serve, token_in, until

from cluster.config import ServeConfig
from cluster.model import ModelSource, end_ids
from cluster.serving.decoding import Sampling
from cluster.serving.engine import Engine
from cluster.serving.holder import ModelHolder
from cluster.serving.service import Service
from cluster.serving.slots import Job
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec
from pipelines.chat import Chat
from pipelines.cli import main

BASE, ONE, TWO, PARROT = "tiny", "tiny-one.v1", "tiny-two", "parrot"
CTRL_C = "\x03"
HARMLESS = "\u2028ok\n\t."


@pytest.fixture(scope="module")
def tiny(served: tuple[ModelSource, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    source, adapters = served
    spec = ServeSpec("test", source, BASE, FixedSource(adapters), tuple(adapters))
    service = Service.load(spec, ServeConfig(max_new_tokens=200, max_concurrent=2, max_waiting=0))
    with serve(service, tmp_path_factory.mktemp("tiny")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, tokenizer = make_parrot()
    limits = ServeConfig(max_new_tokens=90_000, max_concurrent=2, max_waiting=0)
    engine = Engine(model, copy.deepcopy(tokenizer), end_ids(model.generation_config), 2, 0)
    service = Service(engine, ModelHolder(model), tokenizer, (PARROT, None), FixedSource({}), limits)
    with serve(service, tmp_path_factory.mktemp("parrot")) as endpoint:
        yield endpoint


@pytest.fixture
def prompts(caplog: pytest.LogCaptureFixture) -> Callable[[], list[int]]:
    """Tokens of the prompts so far, as the access log has them."""
    caplog.set_level(logging.INFO, logger="ray.serve.rankline")

    def found() -> list[int]:
        lines = [record.getMessage() for record in caplog.records if "prompt_tokens=" in record.getMessage()]
        return [int(line.partition("prompt_tokens=")[2].split()[0]) for line in lines]

    return found


# For scripts


def test_only_the_answer_is_printed(parrot: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-m", "say a", *parrot.options]) == 0
    assert capsys.readouterr() == ("bcd\n", "")


def test_the_first_adapter_answers_unless_another_is_named(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    options = ["--system", "be brief", "--max-tokens", "12", "--temperature", "0", "-m", "hello", *tiny.options]
    for model, named in ((ONE, []), (TWO, [TWO]), (BASE, [BASE])):
        assert main(["chat", *named, *options, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["text"] == tiny.post(model=model, messages=messages, max_tokens=12, temperature=0)
        assert (answer["model"], answer["version"], answer["tokens"]) == (model, model, 12)
        assert 0 < answer["first_s"] < answer["seconds"]
        assert answer["tokens_per_s"] == pytest.approx(11 / (answer["seconds"] - answer["first_s"]))
    assert main(["chat", *options]) == 0
    assert "cut at the limit of tokens" in capsys.readouterr().err


def test_text_from_a_pipe(parrot: Served) -> None:
    for text in (b"say a\n", b"\xff say a"):
        done = subprocess.run([*COMMAND, *parrot.options], input=text, capture_output=True, timeout=60)
        assert (done.stdout, done.stderr, done.returncode) == (b"bcd\n", b"", 0)


def test_no_control_character_reaches_the_terminal(parrot: Served, capsys: pytest.CaptureFixture[str]) -> None:
    raw = parrot.post(model=PARROT, messages=[{"role": "user", "content": "!"}], temperature=0)
    assert raw == ATTACK[1:]
    assert main(["chat", "-m", "!", *parrot.options]) == 0
    assert capsys.readouterr() == (HARMLESS + "\n", "")


def test_ctrl_c_leaves_what_came(parrot: Served) -> None:
    with subprocess.Popen(
        [*COMMAND, "-m", "0", *parrot.options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stdout.read(10) == b"1234567890"
        run.send_signal(signal.SIGINT)
        rest, message = run.communicate(timeout=30)
    assert run.returncode == 130
    assert rest.endswith(b"\n")
    assert message == b"rankline chat: stopped; the answer is not complete.\n"
    until(lambda: sum(parrot.service.live) == 0)


def test_without_a_chat_template_the_last_message_is_completed(
    parrot: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prompts: Any
) -> None:
    monkeypatch.setattr(parrot.service._tokenizer, "chat_template", None)
    assert main(["chat", "-m", "a", *parrot.options]) == 0
    out, err = capsys.readouterr()
    assert out == "bcd\n"
    assert "no chat template" in err
    talk = parrot.chat(PARROT)
    assert converse(talk, "a", "a", capsys=capsys).count("no chat template") == 1
    until(lambda: prompts() == [1, 1, 1])


# What goes wrong


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["none"], 2, f"'none' does not exist. See /v1/models. It lists: {BASE}, {ONE}, {TWO}."),
        (["--max-tokens", "201"], 2, "this endpoint allows at most 200"),
        (["--max-tokens", "0"], 2, "give 1 or more"),
        (["--temperature", "nan"], 2, "from 0 to 2"),
        (["-m", " "], 2, "the message is empty"),
        (["-m", "x" * 300], 2, "Shorten the prompt"),
        (["-m", "\udcff"], 2, "messages"),
        (["--url", "127.0.0.1:8000"], 2, "Give http://HOST:PORT"),
        (["--url", "http://127.0.0.1:x"], 2, "Give http://HOST:PORT"),
        (["--token-file", "absent"], 2, "read token file absent"),
        (["--url", "http://127.0.0.1:1"], 4, "Connection refused. Deploy the endpoint with `rankline serve RUN`"),
    ],
)
def test_refusals_say_what_to_do(
    tiny: Served, options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "-m", "hello", *tiny.options, *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert TOKEN not in err


def test_a_wrong_token(tiny: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = token_in(tmp_path, "some-other-token")
    assert main(["chat", "-m", "hello", "--url", tiny.url, "--token-file", str(wrong)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"answered 401: A valid token is needed: send `Authorization: Bearer <token>`. The one in {wrong}" in err
    assert "--token-file" in err
    assert "some-other-token" not in err


def test_a_busy_endpoint_says_when_to_come_back(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    endless = Job(None, (1, 2), 10**6, Sampling(temperature=0))
    slots = [tiny.service._engine.submit(endless, lambda _: None) for _ in range(2)]
    try:
        assert main(["chat", "-m", "hello", *tiny.options]) == 4
    finally:
        for slot in slots:
            slot.cancel()
        until(lambda: sum(tiny.service.live) == 0)
    assert "answered 429: The endpoint is busy" in (err := capsys.readouterr().err)
    assert err.endswith("Try again in 1 s.\n")


def test_an_answer_that_breaks_off(
    parrot: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = parrot.service._engine._steps.step

    def fail_after_two(chunks: Any) -> Any:
        if chunks[0].start >= len("[user]a") + 1:
            raise RuntimeError("no memory")
        return step(chunks)

    talk = parrot.chat(PARROT)
    with monkeypatch.context() as patch:
        patch.setattr(parrot.service._engine._steps, "step", fail_after_two)
        said = converse(talk, "a", capsys=capsys)
    assert "bc\nerror: the answer of 'parrot' broke off: The generation failed" in said
    assert talk.turns == [("a", "bc")]
    assert "\nbcd\n" in converse(talk, "/retry", capsys=capsys)
    assert talk.turns == [("a", "bcd")]


# The endpoint of a store


def write_run(store: Path, name: str, url: str, updated: float) -> None:
    (store / name).mkdir(parents=True)
    endpoint = {"url": url, "token_file": str(store / "token")}
    (store / name / "run.json").write_text(json.dumps({"endpoint": endpoint, "updated": updated}))


def test_the_newest_run_whose_endpoint_answers(
    tiny: Served, parrot: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chat", "-m", "say a", "--store", str(tmp_path)]
    assert main(command) == 4
    assert "no run in" in (err := capsys.readouterr().err)
    assert "rankline serve RUN" in err
    write_run(tmp_path, "gone", "http://127.0.0.1:1", 3)
    token_in(tmp_path)
    assert main(command) == 4
    assert f"`rankline serve gone --store {tmp_path}`" in capsys.readouterr().err
    write_run(tmp_path, "b", parrot.url, 2)
    write_run(tmp_path, "a", tiny.url, 1)
    assert main(command) == 0
    assert capsys.readouterr().out == "bcd\n"
    assert main([*command, "--url", f"{parrot.url}/v1/"]) == 0
    assert main([*command, "--url", "http://127.0.0.1:2"]) == 2
    assert "--token-file" in capsys.readouterr().err


# Conversations


def converse(chat: Chat, *lines: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Lines as if they were typed, CTRL_C among them; returns what the terminal shows."""
    typed = iter(lines)

    def read() -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == CTRL_C:
            raise KeyboardInterrupt
        return line

    capsys.readouterr()
    chat.converse(read)
    return capsys.readouterr().out


def test_turns_are_kept_and_sent(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    talk = tiny.chat(ONE, temperature=0, max_tokens=12)
    said = converse(talk, "hello", "", "and you?", CTRL_C, "//odd", capsys=capsys)
    messages: list[dict[str, str]] = []
    for question, answer in talk.turns:
        messages.append({"role": "user", "content": question})
        assert answer == tiny.post(model=ONE, messages=messages, temperature=0, max_tokens=12)
        messages.append({"role": "assistant", "content": answer})
        assert answer in said
    assert [question for question, _ in talk.turns] == ["hello", "and you?", "/odd"]
    assert said.count(f"· {ONE} · cut at the limit of tokens") == 3
    assert said.count("12 tokens · ") == 3
    assert "\nCtrl-D ends the chat\n" in said


def test_commands(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    talk = tiny.chat(ONE, temperature=0, max_tokens=5)
    said = converse(talk, "/models", "/model none", f"/model {TWO}", "/model", "/huh", "/help", "/retry", capsys=capsys)
    for line in (f"  {BASE}         base", f"* {ONE}  adapter {ONE}", f"  {TWO}     adapter {TWO}", f"now {TWO}"):
        assert f"\n{line}\n" in said
    assert "'none' does not exist" in said
    assert "/model: no such command, or it needs a value" in said
    assert "/huh: no such command" in said
    assert "/system TEXT   set" in said
    assert "nothing has been asked yet" in said
    assert talk.model == TWO
    converse(talk, "hello", "/system be brief", "/retry", "/quit", "never read", capsys=capsys)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert talk.turns == [("hello", tiny.post(model=TWO, messages=messages, temperature=0, max_tokens=5))]
    converse(talk, "/reset", "/system", capsys=capsys)
    assert (talk.turns, talk.system) == ([], "")


# At a terminal


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(parrot: Served, prompts: Callable[[], list[int]]) -> None:
    with Terminal(*parrot.options) as terminal:
        terminal.see(f"{PARROT} at {parrot.url}")
        terminal.type("count from 0\r")
        shown = terminal.see("1234567890123")
        terminal.press("\x03")
        shown += terminal.see("stopped")
        until(lambda: sum(parrot.service.live) == 0)
        terminal.type("now a\r")
        terminal.see("bcd\r\n")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    counted = max(re.findall(r"\d+", shown.replace("^C", "")), key=len)
    first, second = prompts()
    assert first == len("[user]count from 0")
    # the terminal drops what is on its way to the screen at a Ctrl-C
    assert len(counted) <= second - first - len("[assistant][user]now a") < 10_000


def test_the_terminal_is_not_attacked(parrot: Served) -> None:
    with Terminal(*parrot.options) as terminal:
        terminal.see("Ctrl-D ends")
        terminal.type("!\r")
        shown = terminal.see("first after")
        terminal.type("/quit\r")
        assert terminal.process.wait(30) == 0
    assert not set("\x07\x08\x00\x9b") & set(shown)
    assert "\x1b]" not in shown
    assert "\u2028ok\r\n\t." in shown
