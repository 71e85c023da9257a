"""The adapter store: loads once, leases, evicts the oldest that nobody uses, and refuses what it must not take."""

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_samples import make_adapter, make_model

from cluster.errors import ServeError
from cluster.serving.holder import ModelHolder
from cluster.serving.sources import UnknownAdapterError, Version
from cluster.serving.store import AdapterStore, FullError, RefusedError
from lowrank.adapters.lora_xs import LoRAXS
from lowrank.adapters.peft_format import save_adapter
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.inject import adapted_layers, speakers
from lowrank.mixing import Mix, Ready
from lowrank.resident import Residents, make_adaptable

TARGETS = ("q_proj", "v_proj", "down_proj")


class Directory:
    """A source over a directory of adapters, which counts what is fetched and can be made slow."""

    def __init__(self, root: Path) -> None:
        self.root, self.gate = root, threading.Event()
        self.fetched: list[str] = []
        self.discarded: list[str] = []
        self.gate.set()

    def model_ids(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.root.iterdir()))

    def resolve(self, model_id: str) -> Version:
        if model_id not in self.model_ids():
            raise UnknownAdapterError(model_id)
        return Version(model_id)

    def fetch(self, version: Version) -> Path:
        self.fetched.append(version.id)
        assert self.gate.wait(20)
        return self.root / version.id

    def discard(self, version: Version) -> None:
        self.discarded.append(version.id)

    def watch(self, moved: Callable[[Version, Version], None]) -> None: ...

    def close(self) -> None: ...


def write(root: Path, name: str, seed: int, **more: Any) -> Path:
    shapes = {n: m.weight.shape for n, m in make_model().named_modules() if n.endswith(TARGETS)}
    adapters = make_adapter(shapes, seed)
    save_adapter(root / name, adapters, AdapterConfig(r=4, lora_alpha=4.0), more)
    return root / name


@pytest.fixture
def source(tmp_path: Path) -> Directory:
    for seed in range(6):
        write(tmp_path, f"a{seed}", seed)
    return Directory(tmp_path)


@pytest.fixture
def model() -> Any:
    return make()


def size_of(model: Any, source: Directory) -> int:
    store = AdapterStore(ModelHolder(model), source, {}, 2**30)
    store.lease(Version("a0")).release()
    store.close()
    return store.counts().resident_bytes


@pytest.fixture
def store(source: Directory, model: Any) -> Iterator[AdapterStore]:
    """With room for three adapters."""
    made = AdapterStore(ModelHolder(model), source, {}, 3 * size_of(make(), source) + 64)
    source.fetched.clear()
    yield made
    made.close()


def make() -> Any:
    model = make_model()
    make_adaptable(model, [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"])
    return model


def logits(model: Any, name: str | None) -> torch.Tensor:
    ids = torch.arange(40, 50)[None]
    for speaker in speakers(model):
        speaker.active = None if name is None else Mix((name,) * 10)
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


def reference(root: Path, name: str) -> torch.Tensor:
    """The logits of an adapter merged into a model of its own."""
    from lowrank.adapters.peft_format import load_adapter

    model = make_model()
    with torch.no_grad():
        for module, adapter in load_adapter(root / name).items():
            model.get_submodule(module).weight += adapter.delta_weight()
        return model(torch.arange(40, 50)[None]).logits


def test_what_is_leased_answers_as_itself_and_stays(store: AdapterStore, source: Directory, model: Any) -> None:
    held = [store.lease(Version(f"a{index}")) for index in range(3)]
    with pytest.raises(FullError, match=r"3 adapters are in use.*serve\.adapter_mib"):
        store.lease(Version("a3"))
    held[1].release()
    held[1].release()
    late = store.lease(Version("a3"))
    for index, lease in ((0, held[0]), (2, held[2]), (3, late)):
        torch.testing.assert_close(logits(model, lease.name), reference(source.root, f"a{index}"), rtol=1e-4, atol=1e-4)
    assert (store.counts().resident, store.counts().evictions, store.counts().misses) == (3, 1, 5)
    again = store.lease(Version("a1")) if held[0].release() is None else None
    assert again is not None
    assert again.name not in {lease.name for lease in (*held, late)}, "a name is never used for another adapter"
    assert store.counts().resident_bytes <= store.counts().limit_bytes


def test_the_one_used_least_recently_makes_room(store: AdapterStore, source: Directory) -> None:
    for name in ("a0", "a1", "a2", "a0", "a3"):
        store.lease(Version(name)).release()
    source.fetched.clear()
    for name in ("a0", "a2", "a3"):
        store.lease(Version(name)).release()
    assert source.fetched == []
    store.lease(Version("a1")).release()
    assert source.fetched == ["a1"]


def test_an_evicted_adapter_leaves_nothing_behind(store: AdapterStore, model: Any) -> None:
    for index in range(6):
        store.lease(Version(f"a{index}")).release()
    held = {name for _, layer in adapted_layers(model) for name in layer.adapters}
    assert len(held) == store.counts().resident == 3
    assert {name for _, layer in adapted_layers(model) for name in layer._ready} == held


def test_requests_for_one_version_share_a_load_and_hold_nobody_up(store: AdapterStore, source: Directory) -> None:
    store.lease(Version("a1")).release()
    source.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(store.lease, Version("a0")) for _ in range(8)]
        deadline = time.monotonic() + 10
        while source.fetched.count("a0") == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        store.lease(Version("a1")).release()  # while the other is being loaded
        source.gate.set()
        names = {future.result().name for future in waiting}
    assert len(names) == 1
    assert source.fetched.count("a0") == 1


def until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_version_that_follows_one_in_use_is_loaded_beforehand(
    store: AdapterStore, source: Directory, engine_log: Any
) -> None:
    store.follow(Version("a4"), Version("a5"))
    assert source.fetched == [], "nobody here asks for it"
    store.lease(Version("a0")).release()
    store.follow(Version("a0"), Version("a1"))
    until(lambda: store.counts().resident == 2)
    assert source.fetched == ["a0", "a1"]
    (source.root / "a5" / "adapter_config.json").write_text("{")
    store.follow(Version("a0"), Version("a5"))
    until(lambda: "load an adapter beforehand" in engine_log.text)
    held = [store.lease(Version(name)) for name in ("a0", "a1", "a2")]
    store.follow(Version("a0"), Version("a3"))  # there is no room: it says so and goes on
    store.close()
    store.follow(Version("a0"), Version("a4"))
    assert len(held) == 3


def test_a_closed_store_gives_what_it_has(store: AdapterStore) -> None:
    store.lease(Version("a0")).release()
    store.close()
    store.lease(Version("a0")).release()
    with pytest.raises(ServeError, match="closed"):
        store.lease(Version("a1"))


def test_the_same_id_with_another_content_is_another_adapter(store: AdapterStore, source: Directory) -> None:
    first = store.lease(Version("a0", "one"))
    second = store.lease(Version("a0", "two"))
    assert first.name != second.name
    assert source.fetched == ["a0", "a0"]


def test_what_can_never_fit_is_refused_and_not_put_off(source: Directory, model: Any) -> None:
    # Of rank 4 a copy of Bᵀ lies beside the tensors of a file, so that a file can fit where its adapter does not.
    store = AdapterStore(
        ModelHolder(model), source, {}, (source.root / "a0" / "adapter_model.safetensors").stat().st_size + 1
    )
    with pytest.raises(RefusedError, match=r"serve\.adapter_mib allows .* for all adapters together"):
        store.lease(Version("a0"))
    store.close()


def test_factors_that_do_not_fit_each_other_never_reach_the_kernel(model: Any) -> None:
    """Their ranks are told by the one, and would be read from the other."""
    for a, core, b in (((64, 8), (4, 4), (8, 4)), ((4, 8), (4, 4), (8, 64))):
        with pytest.raises(AdapterError, match="LoRA-XS factors do not fit"):
            LoRAXS(torch.ones(a), torch.ones(b), torch.ones(core), 1.0)
    swapped = LoRAXS(torch.ones(4, 8), torch.ones(8, 4), torch.ones(4, 4), 1.0)
    swapped.lora_xs_a = torch.ones(64, 8)
    with pytest.raises((AdapterError, RuntimeError), match=r"low-rank form|cannot be multiplied"):
        Ready.of(swapped, torch.nn.Linear(8, 8))
    larger = LoRAXS(torch.ones(4, 8), torch.ones(9, 4), torch.ones(4, 4), 1.0)
    with pytest.raises(AdapterError, match="it is for a 9x8 layer"):
        Residents(model).ready({"model.layers.0.self_attn.q_proj": larger}, {})


def test_a_refused_version_holds_no_tensors(source: Directory, model: Any) -> None:
    gc.collect()
    tensors_before = sum(isinstance(held, torch.Tensor) for held in gc.get_objects())
    store = AdapterStore(ModelHolder(model), source, {}, 2**30)
    rewrite(source.root / "a0", elsewhere)
    for _ in range(3):
        with pytest.raises(RefusedError, match="no linear layer"):
            store.lease(Version("a0"))
    gc.collect()
    assert sum(isinstance(held, torch.Tensor) for held in gc.get_objects()) <= tensors_before
    store.close()


def test_many_threads_never_see_another_adapter(store: AdapterStore, source: Directory, model: Any) -> None:
    """Leases of six adapters in room for three, each checked against its own reference while it is held."""
    expected = {f"a{index}": reference(source.root, f"a{index}") for index in range(6)}
    speaking, wrong, full = threading.Lock(), [], []

    def ask(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            name = f"a{int(torch.randint(6, (1,), generator=generator))}"
            try:
                lease = store.lease(Version(name))
            except FullError:
                full.append(name)
                continue
            with speaking:  # a model has one active mix
                found = logits(model, lease.name)
            if not torch.allclose(found, expected[name], rtol=1e-4, atol=1e-4):
                wrong.append(name)
            lease.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert wrong == []
    assert len(full) < 50
    assert store.counts().evictions > 5


def bomb(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def pickle_only(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def link(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.safetensors").symlink_to("/etc/passwd")


def pipe(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


def too_large(directory: Path) -> None:
    with (directory / "adapter_model.safetensors").open("r+b") as handle:
        handle.truncate(2**33)


def truncated(directory: Path) -> None:
    with (directory / "adapter_model.safetensors").open("r+b") as handle:
        handle.truncate(1000)


def long_config(directory: Path) -> None:
    (directory / "adapter_config.json").write_text(" " * (2**20 + 1))


def no_object(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("[1]")


def changed(field: str, value: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text())
        config[field] = value
        path.write_text(json.dumps(config))

    return change


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def rewrite(directory: Path, change: Change) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def tensors(change: Change) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, change)


def with_nan(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(held.values()))[0, 0] = torch.nan
    return held


def transposed(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.T.contiguous() for name, tensor in held.items()}


def elsewhere(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.0", "layers.9"): tensor for name, tensor in held.items()}


def wider(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in held.items()}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (bomb, "header has 1099511627776 bytes"),
        (pickle_only, "No such file"),
        (link, "a link"),
        (pipe, "no plain file"),
        (too_large, "no plain file of at most"),
        (truncated, "damaged"),
        (long_config, "no plain file of at most 1048576"),
        (no_object, "no JSON object"),
        (changed("lora_alpha", ["many"]), "lora_alpha is .*allowed is a finite number"),
        (changed("peft_type", "OS_SYSTEM"), "allowed are"),
        (changed("rankline", {"base_sha256": "other"}), "this base has ours"),
        (changed("modules_to_save", ["lm_head"]), "no tensor of it"),
        (tensors(with_nan), "finite|NaN"),
        (tensors(transposed), "adapter"),
        (tensors(elsewhere), "no linear layer"),
        (tensors(wider), "it is for a"),
    ],
)
def test_hostile_files_are_refused_with_a_reason(
    source: Directory, model: Any, damage: Callable[[Path], None], reason: str
) -> None:
    store = AdapterStore(ModelHolder(model), source, {"base_sha256": "ours"}, 2**20)
    damage(source.root / "a0")
    for _ in range(2):
        with pytest.raises(RefusedError, match=reason) as caught:
            store.lease(Version("a0"))
        assert str(source.root) not in str(caught.value), "clients are not told where files lie"
    assert source.fetched == ["a0"], "a refused version is not read again at once"
    store.lease(Version("a1")).release()
    assert store.counts().resident == 1
    assert len({name for _, layer in adapted_layers(model) for name in layer.adapters}) == 1
    store.close()
