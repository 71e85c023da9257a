"""The page: its files say nothing that its policy forbids, and a headless browser asks the tiny model through it."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_http import listening

from cluster.config import ServeConfig
from cluster.model import ModelSource
from cluster.serving import app
from cluster.serving.auth import Key, Keyring
from cluster.serving.service import Service
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec

PAGE = Path(app.__file__).parent / "page"
BASE, ONE, TWO = "tiny", "tiny-one.v1", "tiny-two"
TOKEN = "the-token-of-this-test"
LIMIT = 200
DEADLINE_S = 60.0
#: Containers have no user namespaces for Chromium's sandbox, and the only page that it sees is ours.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip


class Tags(HTMLParser):
    """Every tag of a document with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


HTML, SCRIPT = (PAGE / "index.html").read_text(), (PAGE / "app.js").read_text()
TAGS = Tags(HTML).found


def test_every_file_is_served_and_named() -> None:
    served = {name for name, _ in app.PAGE_FILES.values()}
    named = {value for _, attributes in TAGS for name in ("src", "href") if (value := attributes.get(name))}
    assert served == {path.name for path in PAGE.iterdir()} == named | {"index.html"}


def test_nothing_is_inline() -> None:
    assert not re.findall(r"<script(?![^>]* src=[^>]*></script>)", HTML)
    assert not {tag for tag, _ in TAGS} & {"style", "base", "iframe", "object", "embed"}
    names = {name for _, attributes in TAGS for name in attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]


def test_no_field_has_a_name_that_a_form_would_put_into_the_address() -> None:
    assert not [tag for tag, attributes in TAGS if tag in ("input", "textarea", "select") and "name" in attributes]


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"""://|["'(]//|@import|url\(""", text)


def test_the_script_writes_text_only_and_stores_nothing() -> None:
    forbidden = r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\b|\bFunction\b|\.style\b|Storage\b|indexedDB"
    assert not re.findall(rf"{forbidden}|cookie *[=.]|history\.|location\.(href|search|hash)", SCRIPT)


def test_every_element_that_the_script_looks_up_is_there() -> None:
    ids = {attributes["id"] for _, attributes in TAGS if "id" in attributes}
    assert set(re.findall(r'element\("([^"]+)"\)', SCRIPT)) <= ids


def wait(seen: Callable[[], Any], what: Callable[[], str]) -> None:
    """Until it is seen; `what` is told if that takes too long."""
    deadline = time.monotonic() + DEADLINE_S
    while not seen():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


class Tab:
    """A tab of a headless Chromium over its DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._sent = socket, 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; the events that come in between are kept."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while "id" not in (message := json.loads(self._socket.recv(timeout=DEADLINE_S))):
            self.events.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        wait(lambda: self.js(expression), lambda: f"{expression} in:\n{self.js('document.body.innerText')}")

    def fill(self, selector: str, text: str) -> None:
        """Replace a field's text as typing does."""
        self.js(f"{{ const field = document.querySelector({selector!r}); field.focus(); field.select(); }}")
        self.send("Input.insertText", text=text)

    def press(self, modifiers: int = 0) -> None:
        """Enter; 2 is with Ctrl, 4 with Cmd."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text="" if modifiers else "\r", **key)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({selector!r}).click()")

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({selector!r}).textContent"))

    def complaints(self) -> list[str]:
        """Errors of scripts, of the policy and of the console; an answer with an error status is none."""
        self.js("0")  # what is on its way is here afterwards
        logged = [event["params"]["entry"] for event in self.events if event["method"] == "Log.entryAdded"]
        found = [entry["text"] for entry in logged if (entry["source"], entry["level"]) != ("network", "error")]
        spoken = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return found + [json.dumps(event["params"]) for event in self.events if event["method"] in spoken]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the DevTools of a headless Chromium."""
    pytest.importorskip("websockets.sync.client", reason="needs the websockets package to drive a browser")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: none of chromium, chromium-browser, google-chrome is on the path")
    profile = tmp_path_factory.mktemp("chromium")
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with (profile / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = profile / "DevToolsActivePort"
        wait(lambda: port.exists() and "\n" in port.read_text(), lambda: (profile / "log").read_text())
        yield f"http://127.0.0.1:{port.read_text().split()[0]}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def tab(chromium: str, url: str) -> Iterator[Tab]:
    """The page in a new tab."""
    from websockets.sync.client import connect

    opened = httpx.put(f"{chromium}/json/new?about:blank", trust_env=False).json()
    with connect(opened["webSocketDebuggerUrl"], proxy=None, max_size=None) as socket:
        tab = Tab(socket)
        tab.send("Page.navigate", url=url)
        tab.until("document.readyState === 'complete' && document.activeElement.id === 'token'")
        yield tab
    httpx.get(f"{chromium}/json/close/{opened['id']}", trust_env=False)


@pytest.fixture(scope="module")
def service(served: tuple[ModelSource, dict[str, str]]) -> Iterator[Service]:
    source, adapters = served
    spec = ServeSpec(app_name="test", source=source, base_model_id=BASE, adapters=FixedSource(adapters))
    service = Service.load(spec, ServeConfig(max_new_tokens=LIMIT, max_concurrent=4, max_waiting=0))
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """The real application on a free port of loopback."""
    with listening(app.create_app(service, Keyring([Key("own", TOKEN)]))) as found:
        yield f"{found}/"


def connect(tab: Tab, token: str = TOKEN) -> None:
    tab.fill("#token", token)
    tab.press()
    tab.until("!document.querySelector('#compare').hidden || document.querySelector('#trouble').textContent")


def ask(tab: Tab, prompt: str, max_tokens: int = 12) -> None:
    """Type a prompt and send it with the keyboard."""
    tab.fill("#max-tokens", str(max_tokens))
    tab.fill("#prompt", prompt)
    tab.press(modifiers=2)


def ended(tab: Tab, side: str) -> str:
    """How a side ended, once it has."""
    tab.until(f"['complete', 'stopped', 'failed'].includes(document.querySelector('{side}').dataset.state)")
    return str(tab.js(f"document.querySelector('{side}').dataset.state"))


def answer(url: str, model: str, prompt: str, max_tokens: int = 12, **changes: Any) -> str:
    """What a direct request gets."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0} | changes
    headers = {"Authorization": f"Bearer {TOKEN}"}
    response = httpx.post(f"{url}v1/chat/completions", json=body, headers=headers, trust_env=False)
    return str(response.json()["choices"][0]["message"]["content"])


def fake(tab: Tab, path: str, body: str, status: int = 200, **headers: str) -> None:
    """Answer the next requests for a path in the page itself, without the endpoint."""
    made = f"new Response({json.dumps(body)}, {json.dumps({'status': status, 'headers': headers})})"
    faked = f"async (asked, options) => asked.endsWith('{path}') ? {made} : real(asked, options)"
    tab.js(f"{{ const real = window.fetch; window.fetch = {faked}; }}")


def test_a_wrong_token_is_told_and_the_right_one_lists_the_models(tab: Tab) -> None:
    connect(tab, "wrong")
    assert tab.text("#trouble") == "The endpoint does not accept this token. Check it and try again."
    assert tab.js("document.activeElement.id") == "token"
    tab.fill("#token", "ключ")
    tab.press()
    assert "ASCII" in tab.text("#trouble")
    connect(tab)
    assert tab.js("document.activeElement.id") == "prompt"
    offered = tab.js("[...document.querySelectorAll('.model')].map(list => [list.value, list.options.length])")
    assert offered == [[ONE, 3], [BASE, 3]]
    assert tab.text("#left .version") == f"version {ONE}, over {BASE}"
    assert tab.complaints() == []


def test_both_sides_stream_what_a_direct_request_gets(tab: Tab, url: str) -> None:
    connect(tab)
    tab.js(f"document.querySelector('#left .model').value = {TWO!r}")
    ask(tab, "hello <b>you</b>")
    for side, model in (("#left", TWO), ("#right", BASE)):
        assert ended(tab, side) == "complete"
        assert tab.text(f"{side} .answer") == answer(url, model, "hello <b>you</b>")
        facts = tab.js(f"[...document.querySelectorAll('{side} dd')].map(fact => fact.textContent).join()")
        assert re.fullmatch(rf"\d+ ms,\d+\.\d tokens/s,38 in, 12 out,length: token limit,{model}", facts)
    assert tab.complaints() == []


def test_a_system_prompt_is_sent_and_a_side_can_be_switched_off(tab: Tab, url: str) -> None:
    connect(tab)
    tab.click("details summary")
    tab.fill("#system", "be brief")
    tab.click("#left .asked")
    ask(tab, "hello")
    assert ended(tab, "#right") == "complete"
    both = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert tab.text("#right .answer") == answer(url, BASE, "", messages=both)
    assert tab.text("#left .answer") == ""
    tab.click("#right .asked")
    tab.press(modifiers=4)
    assert "switch one on" in tab.text("#refused")
    assert tab.complaints() == []


def test_stop_ends_both_answers(tab: Tab, url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {side: answer(url, model, "hello", LIMIT) for side, model in (("#left", ONE), ("#right", BASE))}
    step = service._engine._steps.step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return step(*arguments)

    monkeypatch.setattr(service._engine._steps, "step", slow)
    connect(tab)
    ask(tab, "hello", LIMIT)
    for side in whole:
        tab.until(f"document.querySelector('{side} .answer').textContent.length > 2")
        assert tab.js(f"document.querySelector('{side}').dataset.state") == "answering"
    tab.click("#stop")
    for side, text in whole.items():
        assert ended(tab, side) == "stopped"
        shown = tab.text(f"{side} .answer")
        assert text.startswith(shown)
        assert 2 < len(shown) < len(text) / 2
    wait(lambda: not any(service.live), lambda: "a slot is still taken")
    assert tab.js("document.querySelector('#stop').disabled && !document.querySelector('#send').disabled")
    assert tab.complaints() == []


def test_the_token_is_in_no_storage_and_no_address(tab: Tab, url: str) -> None:
    connect(tab)
    ask(tab, "hello")
    assert ended(tab, "#left") == ended(tab, "#right") == "complete"
    stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, history.state, location.href])"
    assert tab.js(stored) == json.dumps([{}, {}, "", None, url], separators=(",", ":"))
    assert tab.js("Promise.all([indexedDB.databases(), caches.keys()])") == [[], []]
    values = "[...document.querySelectorAll('input')].map(field => field.value).join()"
    assert TOKEN not in tab.js(f"document.documentElement.outerHTML + {values}")
    sent = [e["params"]["request"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert len([request for request in sent if TOKEN in json.dumps(request["headers"])]) == 3
    assert not [request["url"] for request in sent if TOKEN in request["url"] or not request["url"].startswith(url)]
    tab.click("#forget")
    tab.until("document.querySelector('#compare')?.hidden && document.readyState === 'complete'")


ERROR = json.dumps({"error": {"message": "No.", "type": "some_error", "param": None, "code": "some_code"}})
DELTA = 'data: {"system_fingerprint": "v", "choices": [{"delta": {"content": "so f"}, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (422, ERROR, {}, "No. (HTTP 422, some_code)"),
        (429, ERROR, {"Retry-After": "7"}, "No. (HTTP 429, some_code) Try again in 7 s."),
        (504, ERROR, {}, "No. (HTTP 504, some_code)"),
        (502, "<h1>Bad gateway</h1>", {}, "The endpoint gives no reason. (HTTP 502)"),
        (200, f"{DELTA}data: {ERROR}\n\n", {}, "No. (some_code)"),
        (200, DELTA, {}, "The endpoint ended the answer before it was complete."),
    ],
)  # fmt: skip
def test_refusals_are_told(tab: Tab, status: int, body: str, headers: dict[str, str], words: str) -> None:
    connect(tab)
    tab.click("#right .asked")
    fake(tab, "/chat/completions", body, status, **headers)
    ask(tab, "hello")
    assert ended(tab, "#left") == "failed"
    assert tab.text("#left .error") == words
    assert tab.text("#left .answer") == ("so f" if status == 200 else "")
    assert tab.text("#right .error") == ""
    assert tab.complaints() == []


def test_a_network_that_is_down_is_told(tab: Tab) -> None:
    connect(tab)
    tab.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    ask(tab, "hello")
    assert ended(tab, "#left") == ended(tab, "#right") == "failed"
    assert "cannot be reached" in tab.text("#left .error")


def test_a_token_that_is_taken_back_is_asked_for_again(tab: Tab) -> None:
    connect(tab)
    fake(tab, "/chat/completions", ERROR, 401)
    ask(tab, "hello")
    tab.until("document.querySelector('#compare').hidden")
    assert "any more" in tab.text("#trouble")
    connect(tab)
    assert tab.js("document.querySelector('#prompt').value") == "hello"


def test_without_a_chat_template_the_prompt_is_sent_as_text(
    tab: Tab, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._tokenizer, "chat_template", None)
    connect(tab)
    ask(tab, "hello")
    assert ended(tab, "#left") == ended(tab, "#right") == "complete"
    assert tab.text("#left [data-fact=tokens]") == "5 in, 12 out"
    assert "no chat template" in tab.js("document.querySelector('#plain:not([hidden])').textContent")


def test_a_long_list_can_be_filtered(tab: Tab) -> None:
    adapters = [{"id": f"task-{index}", "parent": BASE, "root": f"task-{index}:1"} for index in range(3000)]
    fake(tab, "/models", json.dumps({"data": [{"id": BASE, "base": {}}, *adapters]}))
    connect(tab)
    assert tab.js("document.querySelector('#left .model').options.length") == 3001
    tab.fill("#filter", "TASK-299")
    offered = "[...document.querySelector('#left .model').options].map(option => option.value)"
    assert tab.js(offered) == ["task-0", "task-299", *(f"task-{index}" for index in range(2990, 3000))]
    assert tab.text("#matches") == "11 of 3001"
    assert tab.js("document.querySelector('#right .model').value") == BASE


def test_the_policy_forbids_inline_scripts(tab: Tab) -> None:
    """And such a violation is among the complaints that the other tests find none of."""
    tab.js("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert tab.js("window.ran") is None
    assert "Content Security Policy" in "".join(tab.complaints())
