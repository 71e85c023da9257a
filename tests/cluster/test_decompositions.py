"""Every decomposition gives the same bits on the cluster as in one process."""

from typing import Any

import pytest
import torch
from families import DTYPES, dense, fit

from cluster.executor import RayExecutor
from lowrank.decompositions import METHODS
from lowrank.errors import NumericsError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """What the workers compute on: the order of a sum depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("ray_head")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_cluster_gives_the_bits_of_one_process(method: str, dtype: torch.dtype) -> None:
    values = dense(dtype)
    serial = fit(method, values, 1_000)
    remote = fit(method, values, 1_000, RayExecutor(num_cpus=0.5, spread=True))
    for name, tensor in serial.factors.tensors().items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, remote.factors.tensors()[name]), name  # type: ignore[attr-defined]
    assert remote.report.relative_error == serial.report.relative_error
    assert torch.equal(remote.spectrum, serial.spectrum)


@pytest.mark.usefixtures("ray_head")
@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method.weighted))
def test_the_cluster_gives_the_bits_of_one_process_under_weights(method: str) -> None:
    values, weights = dense(torch.float64), torch.ones(36, 24, dtype=torch.float64)
    weights[::3, ::2] = 0
    options = {"ridge": 1e-3} if method in ("als", "hadamard") else {}
    serial, remote = (
        fit(method, values, 1_000, executor, weights=weights, **options)
        for executor in (None, RayExecutor(num_cpus=0.5, spread=True))
    )
    assert torch.equal(serial.factors.reconstruct(), remote.factors.reconstruct())


@pytest.mark.usefixtures("ray_head")
def test_a_bad_entry_is_named_across_the_cluster() -> None:
    values = dense()
    values[20, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"decompose w: 1 of .* NaN or infinite"):
        fit("block_krylov", values, 1_000, RayExecutor(num_cpus=0.5))
