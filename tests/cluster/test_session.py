import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import errors, processes, session
from cluster.head import RECORD_NAME, TOKEN_NAME, Head, read_record, store_lock, write_record


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def store_of(head: Head) -> Path:
    return Path(head.token_file).parent


def dead_head(store: Path, **changes) -> Head:
    temp_dir = store / "temp"
    temp_dir.mkdir(parents=True, exist_ok=True)
    head = Head(
        address="127.0.0.1:1", dashboard_url="http://127.0.0.1:2", token_file=str(store / TOKEN_NAME),
        temp_dir=str(temp_dir), marker="marker-of-a-dead-head", host=socket.gethostname(), num_cpus=1,
        started_at=0.0, ports={"gcs": 1}, pids={"raylet": (os.getpid(), 1.0)}, sids=(999999,),
    )  # fmt: skip
    return replace(head, **changes)


def run_python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_record_survives_a_round_trip_and_is_private(tmp_path):
    head = dead_head(tmp_path)
    write_record(tmp_path, head)
    assert read_record(tmp_path) == head
    assert mode(tmp_path / RECORD_NAME) == 0o600


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pids": {}, "sids": []}', '{"pids": [], "sids": []}'])
def test_an_unreadable_record_counts_as_none(tmp_path, text):
    (tmp_path / RECORD_NAME).write_text(text)
    assert read_record(tmp_path) is None
    assert session.status(tmp_path) is None


def test_the_lock_is_exclusive_and_its_wait_bounded(tmp_path):
    late = store_lock(tmp_path, timeout_s=0.2)
    with store_lock(tmp_path), pytest.raises(errors.ConnectError, match="has held"), late:
        pass


def test_stop_clears_a_dead_record_and_ends_only_marked_processes(tmp_path):
    head = dead_head(tmp_path)
    write_record(tmp_path, head)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    orphan = subprocess.Popen(sleep, env=os.environ | {processes.MARKER_ENV_VAR: head.marker})
    bystander = subprocess.Popen(sleep)
    try:
        time.sleep(0.2)
        assert session.status(tmp_path) is None  # raylet's pid is taken by a younger process
        assert session.stop(tmp_path) is True
        assert orphan.wait(timeout=5) == -signal.SIGTERM
        assert bystander.poll() is None
        assert not (tmp_path / RECORD_NAME).exists()
        assert not Path(head.temp_dir).exists()
        assert session.stop(tmp_path) is False
    finally:
        for process in (orphan, bystander):
            process.kill()
            process.wait()


def test_a_head_of_another_machine_is_not_stopped_here(tmp_path):
    write_record(tmp_path, dead_head(tmp_path, host="elsewhere"))
    with pytest.raises(errors.ConnectError, match="elsewhere"):
        session.stop(tmp_path)


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.PortError, match=f"dashboard port={port} is in use"):
            session.start_or_adopt(tmp_path, dashboard_port=port)
    assert not (tmp_path / RECORD_NAME).exists()


@pytest.mark.parametrize(("text", "bits", "problem"), [("x", 0o644, "chmod 600"), ("", 0o600, "empty")])
def test_an_unsafe_token_file_is_refused(tmp_path, text, bits, problem):
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(bits)
    with pytest.raises(errors.TokenError, match=problem):
        session.start_or_adopt(tmp_path / "store", token_path=path)


@pytest.mark.parametrize("address", ["auto", "", "ray://127.0.0.1:10001", "127.0.0.1", "http://127.0.0.1:8265"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(errors.ConnectError, match="need host:port"):
        session.connect(address)


def test_an_unreachable_address_fails_fast(tmp_path):
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x")
    (port,) = processes.free_ports(["p"]).values()
    start = time.monotonic()
    with pytest.raises(errors.ConnectError, match="no Ray head answers"):
        session.connect(f"127.0.0.1:{port}", token_file=token)
    with socket.socket() as silent:  # accepts, and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(errors.ConnectError, match="within 1 s"):
            session.connect(f"127.0.0.1:{silent.getsockname()[1]}", token_file=token, timeout_s=1)
    assert time.monotonic() - start < 10


def test_every_error_pickles():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) == 13
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what, got, allowed, remedy")))
        assert type(copy) is kind
        assert str(copy) == "what, got, allowed, remedy"


def test_the_head_is_private_and_listens_on_loopback_only(ray_head):
    import psutil

    store = store_of(ray_head)
    assert mode(store / RECORD_NAME) == mode(store / TOKEN_NAME) == 0o600
    assert mode(Path(ray_head.temp_dir)) == 0o700
    members = processes.belonging(ray_head.marker, ray_head.sids)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in members
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_second_call_adopts_the_running_head(ray_head):
    start = time.monotonic()
    assert session.start_or_adopt(store_of(ray_head), num_cpus=1) == ray_head
    assert time.monotonic() - start < 5


def test_connected_nodes_are_listed(ray_head):
    (node,) = [node for node in session.nodes() if node["alive"]]
    assert node["num_cpus"] == 6
    assert node["address"] == "127.0.0.1"
    session.connect(ray_head)  # again: does nothing


def test_a_wrong_token_is_told_apart_at_once(ray_head, tmp_path):
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("wrong")
    start = time.monotonic()
    with pytest.raises(errors.TokenError, match="refuses the token"):
        session.connect(ray_head.address, token_file=token)
    assert time.monotonic() - start < 5


def test_a_second_cluster_needs_a_disconnect(ray_head, monkeypatch):
    monkeypatch.setattr("cluster.connection.probe", lambda *_, **__: {"127.0.0.1"})
    with pytest.raises(errors.ConnectError, match="disconnect"):
        session.connect(replace(ray_head, address="127.0.0.1:1"))


START = "import sys, time; from pathlib import Path; from cluster import session; "


def test_a_head_outlives_its_killed_driver_and_ends_whole(tmp_path):
    """Two drivers at once start one head; SIGKILL and Ctrl-C of them leave it; a dead head is replaced."""
    code = START + "print(session.start_or_adopt(Path(sys.argv[1]), num_cpus=1).marker, flush=True); time.sleep(60)"
    drivers = [run_python(code, str(tmp_path)) for _ in range(2)]
    try:
        markers = {driver.stdout.readline().strip() for driver in drivers}
        assert len(markers) == 1
        drivers[0].kill()
        drivers[1].send_signal(signal.SIGINT)
        head = session.status(tmp_path)
        assert head is not None
        assert {head.marker} == markers
        assert session.start_or_adopt(tmp_path) == head
        os.kill(head.pids["gcs_server"][0], signal.SIGKILL)
        time.sleep(0.2)
        assert session.status(tmp_path) is None
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()
        assert session.stop(tmp_path) is True
    assert processes.belonging(head.marker, head.sids) == []
    assert not Path(head.temp_dir).exists()


TWO_NODES = """
import os, signal, sys, time
from pathlib import Path
from cluster import session
from cluster.units import run_units

def unit(index):
    import ray
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()

store, homes = Path(sys.argv[1]), {}
session.connect(session.start_or_adopt(store, num_cpus=2))
sid = session.add_node(store, num_cpus=2)
assert [node["num_cpus"] for node in session.nodes()] == [2, 2]

def on_done(index, node_id):
    homes[index] = node_id
    if len(set(homes.values())) == 2 and not lost:
        lost.append(node_id)
        os.killpg(sid, signal.SIGKILL)

lost = []
run_units(unit, range(24), on_done=on_done, max_in_flight=6)
assert lost and sorted(homes) == list(range(24)), homes
"""


@pytest.mark.slow
def test_units_outlive_a_killed_node(tmp_path):
    driver = run_python(TWO_NODES, str(tmp_path))
    try:
        output, _ = driver.communicate(timeout=200)
        assert driver.returncode == 0, output
    finally:
        driver.kill()
        assert session.stop(tmp_path) is True
