"""Where work goes on several nodes: by what they have, by where its input lies, and away from those that are lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import session
from cluster.errors import ResourceError
from cluster.placement import Placement, Waiting, fits, refuse_unfit, room
from pipelines.config import parse
from pipelines.errors import ConfigError

ROOT = Path(__file__).parents[2]
TWO = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}]


@pytest.mark.parametrize(
    ("wanted", "count", "fitting"),
    [
        ({"CPU": 1.0}, 2, {"pack", "spread", "strict_pack", "strict_spread"}),
        ({"CPU": 1.0}, 3, {"pack", "spread", "strict_pack"}),
        ({"CPU": 2.0}, 3, {"pack", "spread"}),
        ({"CPU": 3.0}, 2, set()),
        ({"CPU": 1.0, "GPU": 1.0}, 1, {"pack", "spread", "strict_pack", "strict_spread"}),
        ({"CPU": 1.0, "GPU": 1.0}, 2, set()),
        ({"CPU": 1.0, "tape": 0.1}, 1, set()),
    ],
)
def test_what_fits_two_nodes(wanted: dict[str, float], count: int, fitting: set[Placement]) -> None:
    every: tuple[Placement, ...] = ("pack", "spread", "strict_pack", "strict_spread")
    assert {placement for placement in every if fits(TWO, wanted, count, placement)} == fitting


def test_the_refusal_says_what_is_short() -> None:
    with pytest.raises(ResourceError, match=r"they need 2 tape, the cluster has 0"):
        refuse_unfit(TWO, {"CPU": 1.0, "tape": 1.0}, 2, "spread")
    with pytest.raises(ResourceError, match=r"'strict_pack': of 2 CPU each, the 2 node\(s\) hold 2, 1\. Set finetune"):
        refuse_unfit(TWO, {"CPU": 2.0}, 3, "strict_pack")
    with pytest.raises(ResourceError, match=r"'strict_spread': of 1 CPU each, the 1 node\(s\) hold 4\."):
        refuse_unfit(TWO[:1], {"CPU": 1.0}, 2, "strict_spread")


def test_fractions_are_counted_as_people_do() -> None:
    assert room({"CPU": 1.0, "disk": 0.3}, {"CPU": 0.1, "disk": 0.1}) == 3


def test_no_node_idles_and_most_units_go_to_their_input() -> None:
    """A queue of units on three nodes of two places each; a unit ends at random."""
    rng = random.Random(0)
    homes = ["a"] * 20 + ["b"] * 20 + ["c"] * 5
    waiting = Waiting(list(enumerate(homes)), near=lambda unit: unit[1])
    running: list[str] = []
    done: list[tuple[str, str]] = []
    while waiting:
        free = {node: 2 - running.count(node) for node in "abc"}
        if max(free.values()) > 0:
            (_, home), node = waiting.take(free)
            assert free[node] == max(free.values())
            running.append(node)
            done.append((home, node))
        else:
            running.pop(rng.randrange(len(running)))
    assert Counter(node for _, node in done)["c"] >= 10, "the node with the fewest own units takes others'"
    assert all(home == node for home, node in done[:12])
    assert sum(home == node for home, node in done) >= 30


def test_units_that_are_put_back_come_first() -> None:
    waiting = Waiting([1, 2, 3], near=None)
    assert waiting.take({}) == (1, "")
    waiting.put_back(1)
    assert waiting.take({"a": 1, "b": 2}) == (1, "b")
    assert len(waiting) == 2


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("{decompose: {CPU: 1}}", "decompose.CPU"),
        ("{finetune: {GPU: 1}}", "finetune.GPU"),
        ("{decompose: {cpu_node: 1.5}}", "decompose.cpu_node"),
        ("{decompose: {cpu_node: 0}}", "decompose.cpu_node"),
        ("{serve: {cpu_node: 1}}", "serve"),
    ],
)
def test_resources_that_ray_would_refuse(override: str, path: str) -> None:
    minimal = {"name": "a", "model": {"source": "m"}, "data": {"train": "t", "heldout": "h"}}
    with pytest.raises(ConfigError) as caught:
        parse(minimal, [f"cluster.stage_resources={override}"])
    assert [problem.startswith(f"cluster.stage_resources.{path}") for problem in caught.value.problems] == [True]
    fine = parse(minimal, ["cluster.stage_resources={decompose: {cpu_node: 0.01}, evaluate: {GPU: 1}}"])
    assert fine.cluster.stage_resources == {"decompose": {"cpu_node": 0.01}, "evaluate": {"GPU": 1.0}}


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, int]]:
    """A head, and the POSIX session of a second node that alone has `tape`."""
    store = tmp_path_factory.mktemp("cluster")
    head = session.start_or_adopt(store, num_cpus=2)
    try:
        yield head, session.add_node(store, num_cpus=2, resources={"tape": 1})
    finally:
        session.stop(store)


# In processes of their own, as this one is connected to the cluster of the other tests.
START = """
import os, signal, sys, time
from collections import Counter
from pathlib import Path
from cluster import session
from cluster.connection import living
from cluster.errors import JobError
from cluster.executor import RayExecutor
from cluster.units import run_units

def where(*_):
    import ray
    time.sleep(0.2)
    return ray.get_runtime_context().get_node_id()

def homes(items, **options):
    found = {}
    run_units(where, items, on_done=found.__setitem__, **options)
    return found

session.connect(sys.argv[1], token_file=Path(sys.argv[2]))
nodes = sorted(living(), key=lambda node: "tape" in living()[node])
plain, taped = nodes
"""
NEAR = """
homes(range(16), max_in_flight=4)  # workers take seconds to start, in which the faster node helps the other out
own = [(index, node) for node in nodes for index in range(8)]
found = homes(own, near=lambda item: item[1], max_in_flight=4)
assert sum(item[1] == node for item, node in found.items()) >= 13, Counter(found.values())
far = homes([(index, plain) for index in range(16)], near=lambda item: item[1], max_in_flight=4)
assert min(Counter(far.values())[node] for node in nodes) >= 5, Counter(far.values())
lone = homes(range(6), max_in_flight=4, resources={"tape": 0.01})
assert set(lone.values()) == {taped}, lone

def nested(_):
    return RayExecutor(resources={"tape": 1}).get(RayExecutor(resources={"tape": 1}).map(where, range(4)))

inner = {}
run_units(nested, [0], on_done=inner.__setitem__, resources={"tape": 1})
assert set(inner[0]) == {taped}, "a task that holds all of it does not wait for its own tasks for ever"
near = RayExecutor(near=lambda arguments: arguments[0], num_cpus=0.1)
assert near.get(near.map(where, [plain, taped] * 3)) == [plain, taped] * 3
assert len(near.get(near.map(where, ["nobody"] * 2))) == 2
"""
LOST = """
def lose(index, _):
    os.killpg(int(sys.argv[3]), signal.SIGKILL)

began = time.monotonic()
try:
    run_units(where, range(40), on_done=lose, resources={"tape": 0.5}, node_wait_s=1.0)
except JobError as error:
    print(error)
assert time.monotonic() - began < 60
"""


def run_on(two_nodes: tuple[Any, int], code: str) -> str:
    head, sid = two_nodes
    command = [sys.executable, "-c", START + code, head.address, head.token_file, str(sid)]
    ended = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.filterwarnings("ignore")
def test_units_and_blocks_go_to_their_input_and_resources(two_nodes: tuple[Any, int]) -> None:
    run_on(two_nodes, NEAR)


@pytest.mark.filterwarnings("ignore")
def test_units_do_not_wait_for_ever_for_nodes_that_are_gone(two_nodes: tuple[Any, int]) -> None:
    """The last test of the file: it takes the second node away."""
    told = run_on(two_nodes, LOST)
    assert "run tasks of 1 CPU and 0.5 tape: every node that fitted is gone, and none came in 1 s" in told
