"""What `load_tensors` reads is what the library reads, and what it refuses too."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowrank.tensor_file import DTYPES, load_tensors


def samples(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"{kind}.{index}": (torch.randn(index + 1, 3, generator=generator) * 9).to(dtype)
        for kind, dtype in DTYPES.items()
        for index in range(3)
    }
    return found | {"none": torch.empty(0, 4), "one": torch.tensor(3.5), "odd": torch.ones(1).to(torch.float8_e4m3fn)}


def assert_same(path: Path) -> None:
    found, flats = load_tensors(path)
    expected = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()), name
    assert sum(flat.nbytes for flat in flats) == sum(tensor.nbytes for tensor in expected.values())


def test_files_of_all_dtypes_and_of_equal_headers(tmp_path: Path) -> None:
    for seed in (1, 2):  # the second file finds the layout of the first
        save_file(samples(seed), tmp_path / f"{seed}.safetensors")
        assert_same(tmp_path / f"{seed}.safetensors")
    first, second = (load_tensors(tmp_path / f"{seed}.safetensors")[0]["F32.2"] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_what_is_let_go_goes_back_to_the_system(tmp_path: Path) -> None:
    """Files come and go beside small tensors, which would sit in the holes that they leave in a heap."""
    path, memory = tmp_path / "large.safetensors", psutil.Process().memory_info
    save_file({"a": torch.arange(2**22, dtype=torch.float32)}, path)
    held, small = [load_tensors(path)[0] for _ in range(4)], list[torch.Tensor]()
    assert torch.equal(held[0]["a"], load_file(path)["a"])
    before = memory().rss
    for _ in range(24):
        held = [*held[1:], load_tensors(path)[0]]
        small += [torch.ones(2**14) for _ in range(4)]
    assert memory().rss - before < 2 * 2**24 + sum(tensor.nbytes for tensor in small)
    held[0]["a"].zero_()
    del held
    assert memory().rss < before - 2 * 2**24


def test_tensors_stay_when_their_file_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(samples(1), path)
    found, _ = load_tensors(path)
    path.write_bytes(b"")
    assert torch.equal(found["F64.2"], samples(1)["F64.2"])


@pytest.mark.parametrize("cut", [1, 8, 400])
def test_a_cut_file_is_refused_after_a_whole_one_of_its_header(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(samples(1), path)
    load_tensors(path)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with pytest.raises(SafetensorError):
        load_tensors(path)
    path.write_bytes(data + bytes(cut))
    with pytest.raises(SafetensorError):
        load_tensors(path)
