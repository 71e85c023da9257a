"""An endpoint on loopback, a model that answers as it is told to, and a terminal."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from serving_http import listening
from serving_samples import EOS, make_tokenizer

from cluster.serving.app import create_app
from cluster.serving.auth import Key, Keyring
from cluster.serving.service import Service
from pipelines.chat import Chat
from pipelines.chat_client import ChatClient

TOKEN = "a-token-that-nobody-may-see"
#: What the parrot says: from the character that a question ends with to the end, and round and round the digits.
SHORT, COUNTING, ATTACK = "abcd", "01234567890", "!\x1b]EV\x07\x9bX\u2028\r\x08\x00ok\n\t."
#: Where tests run in the background, a shell has SIGINT ignored, and processes hand that down.
COMMAND = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from pipelines.cli import main; sys.exit(main())",
    "chat",
]
_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@dataclass
class Served:
    """An endpoint on loopback."""

    service: Service
    url: str
    token_file: Path

    @property
    def options(self) -> tuple[str, ...]:
        """What `rankline chat` is told."""
        return "--url", self.url, "--token-file", str(self.token_file)

    def chat(self, model: str, **options: Any) -> Chat:
        """A conversation in this process."""
        return Chat(ChatClient(self.url, self.token_file), model, None, options)

    def post(self, **body: Any) -> str:
        """The text of an answer, asked for without `rankline chat`."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, trust_env=False)
        return str(reply.raise_for_status().json()["choices"][0]["message"]["content"])


@contextlib.contextmanager
def serve(service: Service, directory: Path) -> Iterator[Served]:
    """The real application over a service, which is closed at the end."""
    try:
        with listening(create_app(service, Keyring([Key("own", TOKEN)]))) as url:
            yield Served(service, url, token_in(directory))
    finally:
        service.close()


def token_in(directory: Path, token: str = TOKEN) -> Path:
    """A token file."""
    path = directory / "token"
    path.write_text(token + "\n")
    path.chmod(0o600)
    return path


def until(seen: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_parrot() -> tuple[Any, Any]:
    """A Llama of which every token has one successor, and its tokenizer; the template ends with the question."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    config = LlamaConfig(
        vocab_size=257, hidden_size=288, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=100_000, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            parameter.zero_()
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(257, 288))
        for text in (SHORT, COUNTING, ATTACK):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            for token, following in zip(ids, [*ids[1:], EOS]):
                if not model.lm_head.weight[:, token].any():
                    model.lm_head.weight[following, token] = 100
    return model, tokenizer


class Terminal:
    """`rankline chat` at a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self._own, theirs = pty.openpty()
        take = [sys.executable, "-c", "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                "os.execv(sys.argv[1], sys.argv[1:])"]  # fmt: skip
        self.process = subprocess.Popen(
            [*take, *COMMAND, *options], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self._unread = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def press(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def type(self, keys: str) -> None:
        """Press keys once there is a prompt; before, the terminal itself would take them."""
        self.see("> ")
        self.press(keys)

    def see(self, text: str) -> str:
        """Wait for a text; returns what came until it ended."""
        deadline = time.monotonic() + 30
        while text not in self._unread:
            assert select.select([self._own], [], [], deadline - time.monotonic())[0], self._unread
            self._unread += os.read(self._own, 4096).decode()
        found, _, self._unread = self._unread.partition(text)
        return found + text
