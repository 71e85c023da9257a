"""What the tests of training share."""

from collections.abc import Callable, Iterator

import pytest
from training import only_rank


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Run a job in this process as the only rank."""
    with only_rank(tmp_path_factory.mktemp("alone")) as run:
        yield run
