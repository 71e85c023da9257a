import operator
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

from cluster import units as module
from cluster.errors import JobError, ResourceError
from cluster.executor import RayExecutor
from cluster.units import run_units, run_units_serial
from lowrank.errors import RankError
from lowrank.executor import SerialExecutor

# Workers cannot import a test module under pytest's importlib mode, so the remote functions here are nested ones,
# which travel by value.


@pytest.fixture(scope="module")
def executors(ray_head):
    return SerialExecutor(), RayExecutor(num_cpus=0.5, max_in_flight=3, spread=True)


def blocks(count: int, size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_map_and_reduce_equal_the_serial_ones_bit_for_bit(executors, count):
    results = []
    for executor in executors:
        refs = [executor.put(block) for block in blocks(count)]
        right = executor.put(blocks(1)[0])
        products = executor.map(torch.matmul, refs, [right] * count, label="products")
        results.append((executor.get(products), executor.get(executor.reduce(operator.add, products))))
    (serial, serial_sum), (remote, remote_sum) = results
    assert len(serial) == len(remote) == count
    assert all(torch.equal(a, b) for a, b in zip(serial, remote))
    assert torch.equal(serial_sum, remote_sum)


def test_both_executors_share_the_small_print(executors):
    for executor in executors:
        assert executor.get(executor.map(pow, [2, 3, 4], [2, 2])) == [4, 9]
        assert executor.get([]) == []
        assert executor.map(pow, [], []) == []
        one = executor.put(5)
        assert executor.get(executor.reduce(operator.add, [one])) == 5
        with pytest.raises(ValueError, match="at least one"):
            executor.reduce(operator.add, [])


def test_tasks_compute_on_one_thread(executors):
    def threads(_: int) -> tuple[int, str | None]:
        import torch

        return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")

    assert set(executors[1].get(executors[1].map(threads, range(4)))) == {(1, "1")}


def test_an_exception_keeps_its_type_through_a_chain_of_tasks(executors):
    def fail(x: int) -> int:
        raise RankError(f"rank {x} is too large")

    def plain(x: int) -> int:
        return x

    _, executor = executors
    with pytest.raises(RankError, match="rank 7 is too large") as caught:
        executor.get(executor.map(plain, executor.map(fail, [7])))
    assert type(caught.value) is RankError
    assert "in fail" in str(caught.value.__cause__)  # the remote traceback
    assert type(pickle.loads(pickle.dumps(caught.value))) is RankError


def test_an_exception_that_does_not_pickle_is_explained(executors):
    def fail(_: int) -> None:
        class Unpicklable(Exception):
            def __init__(self, a: int, b: int) -> None:
                super().__init__("what went wrong")

        raise Unpicklable(1, 2)

    with pytest.raises(JobError, match=r"does not pickle .*what went wrong"):
        executors[1].get(executors[1].map(fail, [0]))


def test_a_killed_worker_runs_again_and_an_exception_does_not(executors, tmp_path):
    def die_once(marker: str) -> str:
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return "second attempt"

    def fail_and_count(folder: str) -> None:
        open(os.path.join(folder, f"try-{time.time_ns()}"), "w").close()
        raise ValueError("once is enough")

    _, executor = executors
    assert executor.get(executor.map(die_once, [str(tmp_path / "died")])) == ["second attempt"]
    with pytest.raises(ValueError, match="once is enough"):
        executor.get(executor.map(fail_and_count, [str(tmp_path)])[0])
    assert len(list(tmp_path.glob("try-*"))) == 1


def test_a_worker_that_always_dies_is_a_job_error(ray_head):
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    executor = RayExecutor(max_retries=0)
    with pytest.raises(JobError, match="its worker or node died"):
        executor.get(executor.map(lambda _: die(), [0])[0])


@pytest.mark.parametrize("ask", [{"num_cpus": 64}, {"memory_bytes": 1 << 60}])
def test_a_task_larger_than_every_node_is_refused(ray_head, ask):
    with pytest.raises(ResourceError, match="no node is large enough"):
        RayExecutor(**ask)


def test_map_holds_back_submissions(ray_head, tmp_path):
    def touch(index: int) -> None:
        (tmp_path / str(index)).touch()
        time.sleep(0.2)

    RayExecutor(num_cpus=0.5, max_in_flight=2).map(touch, range(5))
    assert len(list(tmp_path.iterdir())) >= 3  # the fifth was submitted after three had ended


@pytest.fixture(params=[run_units_serial, run_units])
def runner(request):
    if request.param is run_units:
        request.getfixturevalue("ray_head")
    return request.param


def test_every_unit_is_reported_once(runner):
    done: dict[int, int] = {}
    runner(lambda x: x * x, range(9), on_done=done.__setitem__, num_cpus=0.5, max_in_flight=3)
    assert done == {x: x * x for x in range(9)}
    runner(lambda x: x, [], on_done=done.__setitem__)


def test_should_stop_lets_units_in_flight_end(runner):
    done: list[int] = []
    runner(
        lambda x: x,
        range(50),
        on_done=lambda item, _: done.append(item),
        max_in_flight=2,
        should_stop=lambda: len(done) >= 3,
    )
    assert 3 <= len(done) <= 4


def test_a_failing_unit_stops_the_rest_and_keeps_its_type(runner, tmp_path):
    def unit(x: int) -> int:
        (tmp_path / str(x)).touch()
        if x == 2:
            raise RankError("unit 2")
        time.sleep(0.1)
        return x

    done: list[int] = []
    with pytest.raises(RankError, match="unit 2") as caught:
        runner(unit, range(40), on_done=lambda item, _: done.append(item), num_cpus=0.5, max_in_flight=3)
    assert type(caught.value) is RankError
    started = {int(path.name) for path in tmp_path.iterdir()}
    assert len(started) < 10
    assert set(done) == started - {2}


def test_a_failing_on_done_surfaces(runner):
    def refuse(item: int, result: int) -> None:
        raise OSError(f"disk full at {item}")

    with pytest.raises(OSError, match="disk full at 0"):
        runner(lambda x: x, [0], on_done=refuse)


def test_units_in_flight_are_bounded(ray_head, tmp_path):
    def unit(x: int) -> int:
        mine = tmp_path / f"running-{x}"
        mine.touch()
        most = len(list(tmp_path.glob("running-*")))
        time.sleep(0.1)
        mine.unlink()
        return most

    seen: list[int] = []
    run_units(unit, range(8), on_done=lambda _, most: seen.append(most), num_cpus=0.1, max_in_flight=2)
    assert len(seen) == 8
    assert max(seen) <= 2


def test_a_unit_outlives_its_killed_worker(ray_head, tmp_path):
    def unit(x: int) -> int:
        marker = Path(tmp_path) / f"died-{x}"
        if x == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    done: dict[int, int] = {}
    run_units(unit, range(3), on_done=done.__setitem__, num_cpus=0.5, max_in_flight=2)
    assert done == {0: 0, 1: 1, 2: 2}


def test_a_straggler_is_cancelled_after_the_grace(ray_head, monkeypatch):
    def unit(x: int) -> int:
        if x == 0:
            time.sleep(120)
        raise ValueError("fast failure")

    monkeypatch.setattr(module, "GRACE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match="fast failure"):
        run_units(unit, range(2), on_done=lambda *_: None, num_cpus=0.5, max_in_flight=2)
    assert time.monotonic() - start < 30
