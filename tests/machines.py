"""Machines on one machine: a network namespace each, on one bridge, with a Ray node whose link can be taken away."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

from cluster import processes

#: A node that does not answer for so long is dead to the head: three looks, a second apart, of 1.5 seconds each. What
#: was sent to it counts as lost after 5 seconds (120 unless told), as Ray asks no head about its connections.
HEALTH = {
    "grpc_client_keepalive_timeout_ms": 5000,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}
_PORT = 6379
#: What Ray's provider of fake nodes wants of a head, whose id it presupposes.
FAKE_CLOUD = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "0" * 5,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


class Machine:
    """One namespace `name` with the address `ip`, and the Ray node in it."""

    def __init__(self, name: str, cable: str, ip: str) -> None:
        self.name, self.cable, self.ip = name, cable, ip
        self.node = ""

    @property
    def within(self) -> list[str]:
        """What stands before a command that runs in it."""
        return ["ip", "netns", "exec", self.name]

    def processes(self) -> list[psutil.Process]:
        """All that run in it."""
        found = []
        for pid in ip("netns", "pids", self.name).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def raylet(self) -> psutil.Process | None:
        return next((process for process in self.processes() if _name(process) == "raylet"), None)


class Machines:
    """A head and further machines; skips the test where no network namespaces may be made."""

    def __init__(self) -> None:
        self.tag = f"rk{uuid.uuid4().hex[:6]}"
        self.root = Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp"))
        self.token = self.root / "token"
        self.token.write_text("a" * 32)
        self.token.chmod(0o600)
        self.machines: list[Machine] = []
        self._switch = f"{self.tag}-sw"

    def __enter__(self) -> Machines:
        if shutil.which("ip") is None:
            pytest.skip("no ip: install iproute2")
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "bridge0", "type", "bridge")
            ip("-n", self._switch, "link", "set", "bridge0", "up")
            self._plug()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for machine in self.machines:
            for process in machine.processes():
                process.kill()
        for name in [machine.name for machine in self.machines] + [self._switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def head(self) -> Machine:
        return self.machines[0]

    @property
    def address(self) -> str:
        return f"{self.head.ip}:{_PORT}"

    def _plug(self) -> Machine:
        number = len(self.machines) + 1
        machine = Machine(f"{self.tag}-{number}", f"cable{number}", f"10.213.0.{number}")
        ip("netns", "add", machine.name)
        self.machines.append(machine)
        here, switch = ("-n", machine.name), ("-n", self._switch)
        ip(*switch, "link", "add", machine.cable, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
        ip(*switch, "link", "set", machine.cable, "master", "bridge0", "up")
        ip(*here, "address", "add", f"{machine.ip}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip(*here, "link", "set", link, "up")
        ip(*here, "route", "add", "default", "via", "10.213.0.254")
        return machine

    def start(
        self, num_cpus: int, resources: Mapping[str, float] | None = None, autoscaling: Mapping[str, Any] | None = None
    ) -> Machine:
        """Start a Ray node in a machine of its own; the first is the head, with an autoscaler if told how."""
        first = not self.head.node
        machine = self.head if first else self._plug()
        temporary = self.root / str(len(self.machines))
        temporary.mkdir()
        flags = ["--head", f"--port={_PORT}", "--include-dashboard=false", "--system-config", json.dumps(HEALTH)]
        if autoscaling is not None:
            (temporary / "autoscaling.json").write_text(json.dumps(autoscaling))
            flags.append(f"--autoscaling-config={temporary}/autoscaling.json")
        command = [
            *machine.within, sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats",
            *(flags if first else [f"--address={self.address}"]), f"--node-ip-address={machine.ip}",
            f"--num-cpus={num_cpus}", f"--resources={json.dumps(dict(resources or {}))}", f"--temp-dir={temporary}/ray",
        ]  # fmt: skip
        environment = processes.head_environment(self.tag, self.token, temporary) | {"GLOO_SOCKET_IFNAME": "eth0"}
        if autoscaling is not None:
            environment |= FAKE_CLOUD
        environment.pop(processes.LOOPBACK_ENV_VAR)
        started = subprocess.run(command, env=environment, cwd=temporary, capture_output=True, text=True, timeout=120)
        raylet = machine.raylet()
        assert started.returncode == 0, started.stdout + started.stderr
        assert raylet is not None, started.stdout + started.stderr
        machine.node = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))
        return machine

    def cut(self, machine: Machine) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        ip("-n", self._switch, "link", "set", machine.cable, "down")

    def join(self, machine: Machine) -> None:
        """Plug the cable in again."""
        ip("-n", self._switch, "link", "set", machine.cable, "up")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def gone(machine: Machine, timeout_s: float) -> bool:
    """Whether the Ray node of a machine ends within some time."""
    deadline = time.monotonic() + timeout_s
    while machine.raylet() is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    return machine.raylet() is None


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""
