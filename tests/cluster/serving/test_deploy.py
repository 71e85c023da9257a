"""One endpoint on real Ray Serve, asked by OpenAI's own client; ports, redeploys and errors around it."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_samples import free_port

from cluster.config import ServeConfig
from cluster.errors import PortError, ResourceError, ServeError
from cluster.model import ModelSource
from cluster.serving import deploy as deploying
from cluster.serving.auth import read_token
from cluster.serving.client import smoke, wait_ready
from cluster.serving.deploy import deploy, endpoint_url, undeploy
from cluster.serving.service import Service
from cluster.serving.sources import FixedSource, UnknownAdapterError
from cluster.serving.spec import Endpoint, ServeSpec

BASE, ONE, TWO = "tiny", "tiny-one.v1", "tiny-two"


@dataclass(frozen=True)
class Deployed:
    spec: ServeSpec
    config: ServeConfig
    endpoint: Endpoint


@pytest.fixture(scope="module")
def deployed(
    ray_head: Any, served: tuple[ModelSource, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    source, adapters = served
    token_file = str(tmp_path_factory.mktemp("token") / "token")
    spec = ServeSpec("tiny-app", source, BASE, FixedSource(adapters), tuple(adapters), token_file)
    config = ServeConfig(port=free_port(), num_cpus=0.5, max_new_tokens=64)
    yield Deployed(spec, config, deploy(spec, config))
    assert undeploy("tiny-app")
    assert not undeploy("tiny-app")
    with pytest.raises(httpx.ConnectError):
        httpx.get(endpoint_url(config) + "/readyz", trust_env=False)


def test_openai_client_and_redeploy(deployed: Deployed) -> None:
    from openai import AuthenticationError, NotFoundError, OpenAI

    endpoint, token = deployed.endpoint, read_token(deployed.spec.token_file)
    assert endpoint.model_ids == (BASE, ONE, TWO)
    measured = smoke(endpoint, token, "hello", ONE)
    assert (measured["route"], measured["completion_tokens"]) == ("/v1/chat/completions", 16)
    with OpenAI(base_url=f"{endpoint.url}/v1", api_key=token, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [BASE, ONE, TWO]
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(model=ONE, **asked)
        assert whole.choices[0].message.content == measured["text"]
        stream = client.chat.completions.create(model=ONE, stream=True, stream_options={"include_usage": True}, **asked)
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == measured["text"]
        assert chunks[-1].usage == whole.usage
        with client.completions.create(model=TWO, prompt="a", temperature=0, stream=True, max_tokens=8) as pieces:
            assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"
        with pytest.raises(NotFoundError, match="does not exist"):
            client.chat.completions.create(model="none", **asked)
    stranger = OpenAI(base_url=f"{endpoint.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(AuthenticationError):
        stranger.models.list()
    assert isinstance(deployed.spec.adapters, FixedSource)
    alone = FixedSource({TWO: deployed.spec.adapters.adapters[TWO]})
    again = deploy(replace(deployed.spec, adapters=alone, required=(TWO,)), deployed.config)
    assert again == replace(endpoint, model_ids=(BASE, TWO))
    headers = {"Authorization": f"Bearer {token}"}
    listed = httpx.get(f"{endpoint.url}/v1/models", headers=headers, trust_env=False).json()
    assert [model["id"] for model in listed["data"]] == [BASE, TWO]


def test_serve_has_one_port(deployed: Deployed) -> None:
    with pytest.raises(PortError, match=f"already runs.*:{deployed.config.port}"):
        deploy(deployed.spec, replace(deployed.config, port=free_port()))


def test_too_few_cpus(deployed: Deployed) -> None:
    with pytest.raises(ResourceError, match=r"Lower serve\.num_replicas"):
        deploy(deployed.spec, replace(deployed.config, num_replicas=100))


def test_a_taken_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "_is_head_node", lambda: True)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PortError, match=r"Set serve\.port"):
            deploying._require_free("127.0.0.1", other.getsockname()[1])


def test_urls() -> None:
    assert endpoint_url(ServeConfig(port=1)) == "http://127.0.0.1:1"
    assert endpoint_url(ServeConfig(host="0.0.0.0", port=1)) == "http://127.0.0.1:1"
    assert endpoint_url(ServeConfig(host="::", port=1)) == "http://[::1]:1"


def test_nobody_answers() -> None:
    endpoint = Endpoint("a", "/", f"http://127.0.0.1:{free_port()}", 1, ("m",))
    with pytest.raises(ServeError, match="not ready after"):
        wait_ready(endpoint.url, 0.3)
    with pytest.raises(ServeError, match="no answer"):
        smoke(endpoint, "t", "hello", "m")


def test_sources_and_clashing_ids(served: tuple[ModelSource, dict[str, str]], tmp_path: Path) -> None:
    source = FixedSource({"a": str(tmp_path), "a:1": str(tmp_path)})
    assert source.model_ids() == ("a", "a:1")
    assert source.resolve("a") == source.resolve("a:1")
    assert source.fetch(source.resolve("a:1")) == tmp_path
    with pytest.raises(UnknownAdapterError, match="Known are"):
        source.resolve("../a")
    with pytest.raises(ServeError, match="both called 'a'"):
        Service.load(ServeSpec("x", served[0], "a", source), ServeConfig())
