"""`rankline chat`: one answer for a script, or a conversation in the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import ClusterError
from pipelines.chat_client import Answer, ChatClient
from pipelines.errors import ConfigError, Interrupted
from pipelines.plain_text import plain

Turn = tuple[str, str]
"""A question and its answer."""

COMMANDS = {
    "/models": "list what the endpoint serves",
    "/model ID": "go on with another model; the turns stay",
    "/system TEXT": "set the system message; without TEXT there is none",
    "/reset": "forget all turns",
    "/retry": "ask the last question again; the new answer replaces the old one",
    "/help": "this list; a message that starts with / is written with two: //",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}
_NO_TEMPLATE = (
    "this model has no chat template: it completes your last message alone, without system message and turns, by the "
    "endpoint's default of tokens for completions (16, unless --max-tokens says otherwise)"
)
_CUT = "cut at the limit of tokens (--max-tokens)"


def check_options(max_tokens: int | None, temperature: float | None) -> dict[str, int | float]:
    """The options that were given, as the endpoint takes them.

    Raises:
        ConfigError: a value that no endpoint allows.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"chat --max-tokens {max_tokens}: give 1 or more.")
    if temperature is not None and not 0 <= temperature <= 2:
        raise ConfigError(f"chat --temperature {temperature:g}: give a number from 0 to 2.")
    given = {"max_tokens": max_tokens, "temperature": temperature}
    return {name: value for name, value in given.items() if value is not None}


def find_message(given: str | None, as_json: bool) -> str | None:
    """What `-m` or stdin says; None is a conversation.

    Raises:
        ConfigError: there is nothing to send, or a conversation would have to be JSON.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know a character; that is no reason to fail
            stream.reconfigure(errors="replace")
    if given is None and not sys.stdin.isatty():
        given = sys.stdin.read().rstrip("\r\n")
    if given is None and as_json:
        raise ConfigError("chat --json: a conversation is not JSON. Give the message with -m TEXT or on stdin.")
    if given is not None and not given.strip():
        raise ConfigError("chat: the message is empty. Give it with -m TEXT or on stdin.")
    return given


def terminal_lines() -> Callable[[], str]:
    """Asks for a line at each call, with editing and history where readline is there."""
    from rich.console import Console

    prompt = "> "
    try:
        import readline  # from now on `input` uses it
    except ImportError:
        return lambda: input(prompt)
    # Running any Python before a line is read drops a Ctrl-C that came as the answer ended; else the next line is lost.
    readline.set_pre_input_hook(lambda: None)
    console = Console()
    if console.color_system is not None and not console.no_color:
        prompt = "\x01\x1b[1;36m\x02> \x01\x1b[0m\x02"  # readline must not count what is between \x01 and \x02
    return lambda: input(prompt)


class Chat:
    """A conversation with one endpoint, which remembers nothing: all turns are sent with every question."""

    def __init__(self, client: ChatClient, model: str, system: str | None, options: Mapping[str, Any]) -> None:
        from rich.console import Console

        self.model, self.system = model, system
        self.turns: list[Turn] = []
        self._client, self._options = client, options
        self._asked: tuple[str, list[Turn]] | None = None
        self._noted = False
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def once(self, message: str, quiet: bool) -> Answer:
        """Print the answer to one message as it comes, and nothing else; remarks go to stderr.

        Raises:
            Interrupted: the user stopped it.
            ConfigError, TokenError, ServeError: see `ChatClient.ask`.
        """
        answer = Answer(self.model)
        try:
            self._client.ask(self._messages(message, []), self._options, answer, (lambda _: None) if quiet else _print)
        except KeyboardInterrupt:
            raise Interrupted("stopped; the answer is not complete.") from None
        finally:
            if not quiet and answer.text and not answer.text.endswith("\n"):
                print(flush=True)
        if not self._client.chats:
            print(f"rankline chat: {_NO_TEMPLATE}", file=sys.stderr)
        if answer.finish_reason == "length":
            print(f"rankline chat: the answer was {_CUT}", file=sys.stderr)
        return answer

    def converse(self, read: Callable[[], str]) -> None:
        """Answer lines until /quit or the end of input; errors are shown and the conversation goes on."""
        self._say(f"{self.model} at {self._client.url}   /help lists commands, Ctrl-D ends", "dim")
        going = True
        while going:
            try:
                print()
                line = read().strip()
                if line.startswith("/") and not line.startswith("//"):
                    going = self._command(*line.split(maxsplit=1))
                elif line:
                    self._ask(line.removeprefix("/"), self.turns)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                self._say("\nCtrl-D ends the chat", "dim")
            except (ConfigError, ClusterError) as error:
                self._say(f"error: {error}", "red")

    def _messages(self, question: str, turns: Sequence[Turn]) -> list[dict[str, str]]:
        said = [("system", self.system)] if self.system else []
        for asked, answered in turns:
            said += [("user", asked), ("assistant", answered)]
        return [{"role": role, "content": content} for role, content in [*said, ("user", question)]]

    def _ask(self, question: str, turns: list[Turn]) -> None:
        """Stream an answer; as much of it as came is a turn, after `turns`."""
        self._asked = question, turns
        answer = Answer(self.model)
        waiting = self._console.status("")

        def show(text: str) -> None:
            waiting.stop()
            _print(text)

        stopped = False
        try:
            with waiting:
                self._client.ask(self._messages(question, turns), self._options, answer, show)
        except KeyboardInterrupt:
            stopped = True
        finally:
            if answer.text:
                self.turns = [*turns, (question, answer.text)]
                print("" if answer.text.endswith("\n") else "\n", end="", flush=True)
        self._say(_facts(answer, stopped), "dim")
        if not self._client.chats and not self._noted:
            self._noted = True
            self._say(_NO_TEMPLATE, "yellow")

    def _command(self, word: str, value: str = "") -> bool:
        """Do what a command says; false ends the conversation."""
        match word:
            case "/models":
                self._list_models()
            case "/model" if value:
                self.model = self._client.choose(value)
                self._say(f"now {self.model}", "dim")
            case "/system":
                self.system = value
                self._say("the system message is set" if value else "no system message", "dim")
            case "/reset":
                self.turns, self._asked = [], None
                self._say("all turns are forgotten", "dim")
            case "/retry" if self._asked:
                self._ask(*self._asked)
            case "/retry":
                self._say("nothing has been asked yet", "dim")
            case "/help":
                for name, text in COMMANDS.items():
                    self._say(f"{name:<14} {text}")
            case "/quit":
                return False
            case _:
                raise ConfigError(f"{plain(word)}: no such command, or it needs a value. /help lists the commands.")
        return True

    def _list_models(self) -> None:
        found = self._client.models()
        width = max((len(entry["id"]) for entry in found), default=0)
        for entry in found:
            kind = f"adapter {plain(str(entry.get('root', '')))}" if entry.get("parent") else "base"
            self._say(f"{'*' if entry['id'] == self.model else ' '} {entry['id']:<{width}}  {kind}")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style)


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _facts(answer: Answer, stopped: bool) -> str:
    """The line under an answer."""
    if not answer.tokens:
        return "stopped before the first token" if stopped else "the answer is empty"
    facts = [f"{'about ' if stopped else ''}{answer.tokens} tokens"]
    if answer.tokens_per_s:
        facts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    facts += [f"first after {answer.first_s:.2f} s", answer.version or answer.model]
    if stopped or answer.finish_reason == "length":
        facts.append("stopped" if stopped else _CUT)
    return " · ".join(facts)
