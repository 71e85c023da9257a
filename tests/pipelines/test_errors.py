"""What goes wrong at a user's hands: exit code, what it was, what to do about it, and never a traceback.

Each case is found before a cluster is started, by `run` as by `plan`; the rest of the line never begins.
"""

from __future__ import annotations

import errno
import json
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lines import chat_rows, make_data, make_model_dir
from tiny import write_jsonl

from cluster.known_models import causal_model_types
from lowrank.headers import gguf_headers
from pipelines.cli import main
from pipelines.errors import exit_code, explain


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


class Case:
    """A pipeline that would run, to be spoiled in one point."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.model = root / "model"
        shutil.copytree(model, self.model)
        self.store = root / "store"
        self.store.mkdir()
        self.data = make_data(root)
        self.values: dict[str, Any] = {
            "name": "tiny",
            "model": {"source": str(self.model)},
            "data": self.data,
            "decompose": {"rank": 2},
            "serve": {"enabled": False},
            "store": {"path": str(self.store)},
        }

    def write(self) -> str:
        path = self.root / "tiny.yaml"
        path.write_text(yaml.safe_dump(self.values))
        return str(path)

    def config_json(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def case(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    def never(*_: object) -> None:
        raise AssertionError("a cluster was about to be started")

    monkeypatch.setattr("pipelines.session.open_cluster", never)
    return Case(tmp_path, model)


def unknown_keys(case: Case) -> None:
    case.values |= {"colour": 1, "decompose": {"rank": 2, "rnak": 3}}


def missing_model(case: Case) -> None:
    shutil.rmtree(case.model)


def missing_package(case: Case) -> None:
    case.values["model"] = {"source": "package:no-such-package-here"}


def unknown_architecture(case: Case) -> None:
    case.config_json(model_type="martian", architectures=["MartianForCausalLM"])


def encoder_only(case: Case) -> None:
    case.config_json(model_type="vit")


def quantized_already(case: Case) -> None:
    case.config_json(quantization_config={"bits": 4})


def pickle_checkpoint(case: Case) -> None:
    (case.model / "model.safetensors").unlink()
    torch.save({}, case.model / "pytorch_model.bin")


def corrupt_header(case: Case) -> None:
    path = case.model / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def truncated_weights(case: Case) -> None:
    path = case.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def row_without_field(case: Case) -> None:
    rows = [*chat_rows(9), {"text": "not a chat"}]
    write_jsonl(Path(case.data["train"]), rows)


def row_no_json(case: Case) -> None:
    Path(case.data["train"]).write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')


def fields_of_no_format(case: Case) -> None:
    write_jsonl(Path(case.data["heldout"]), [{"question": "a", "reply": "b"}])


def empty_data(case: Case) -> None:
    Path(case.data["train"]).write_text("\n")


def missing_data(case: Case) -> None:
    Path(case.data["heldout"]).unlink()


def duplicates(case: Case) -> None:
    write_jsonl(Path(case.data["heldout"]), [*chat_rows(2, offset=700), *chat_rows(1, offset=4)])


def rank_too_large(case: Case) -> None:
    case.values["decompose"] = {"rank": 2000}


def serve_token_readable(case: Case) -> None:
    path = case.root / "token"
    path.write_text("secret")
    path.chmod(0o644)
    case.values["serve"] = {"token_file": str(path), "port": 1}


def ray_token_readable(case: Case) -> None:
    (case.store / "_ray_token").write_text("secret")
    (case.store / "_ray_token").chmod(0o640)


def no_ray_token(case: Case) -> None:
    case.values["cluster"] = {"address": "127.0.0.1:1", "token_file": str(case.root / "absent")}


def layout_too_small(case: Case) -> None:
    case.values["cluster"] = {"num_cpus": 1}


def unreachable_cluster(case: Case) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = case.root / "token"
    token.write_text("secret")
    token.chmod(0o600)
    case.values["cluster"] = {"address": f"127.0.0.1:{port}", "token_file": str(token)}


def bad_address(case: Case) -> None:
    unreachable_cluster(case)
    case.values["cluster"]["address"] = "ray://127.0.0.1:1"


def mlflow_absent(case: Case) -> None:
    case.values["register"] = {"tracking_uri": f"sqlite:///{case.root}/absent/mlflow.db"}


def mlflow_file_store(case: Case) -> None:
    case.values["register"] = {"tracking_uri": f"file://{case.root}/mlruns"}


def password_in_uri(case: Case) -> None:
    case.values["register"] = {"tracking_uri": "postgresql://me:hunter2@127.0.0.1:9/mlflow"}


#: spoiler -> exit code, words of the message (what it was), words of the remedy
TABLE: dict[Callable[[Case], None], tuple[int, list[str], str]] = {
    password_in_uri: (2, ["register.tracking_uri: holds a password"], "MLFLOW_TRACKING_PASSWORD"),
    unknown_keys: (2, ["colour: unknown", "decompose.rnak: unknown"], "Check the spelling"),
    missing_model: (2, ["model.source", "does not exist"], "Give a Hugging Face directory"),
    missing_package: (2, ["no-such-package-here", "not installed"], "pip install"),
    unknown_architecture: (2, ["martian"], "Llama, Mistral"),
    encoder_only: (2, ["'vit'", "no causal language model"], "Give a decoder"),
    quantized_already: (2, ["already quantized"], "Give the original"),
    pickle_checkpoint: (3, ["pytorch_model.bin", "refused"], "save_pretrained"),
    corrupt_header: (3, ["model.safetensors", "damaged"], "Copy the file again"),
    truncated_weights: (3, ["model.safetensors", "its header describes"], "Copy the file again"),
    row_without_field: (2, ["train.jsonl, row 10", "'messages' is missing"], "Correct or remove the row"),
    row_no_json: (2, ["train.jsonl, row 2", "no JSON"], "Correct the row"),
    fields_of_no_format: (2, ["heldout.jsonl, row 1", "question"], "Rename the fields"),
    empty_data: (2, ["train.jsonl", "no rows"], "Give at least one row"),
    missing_data: (2, ["heldout.jsonl", "no .jsonl"], "Check data.train, data.heldout"),
    duplicates: (2, ["1 held-out row(s)", "5 = 3"], "Remove them"),
    rank_too_large: (2, ["decompose.rank: 2000", "min(m, n) = 8"], "Set decompose.rank <= 8"),
    serve_token_readable: (2, ["token", "0644"], "chmod 600"),
    ray_token_readable: (2, ["_ray_token", "0640"], "chmod 600"),
    no_ray_token: (2, ["absent", "No such file"], "RAY_AUTH_TOKEN_PATH"),
    layout_too_small: (2, ["1 logical CPUs do not hold"], "Set cluster.num_cpus"),
    unreachable_cluster: (4, ["nobody answers at 127.0.0.1"], "Check the address"),
    bad_address: (4, ["ray://127.0.0.1:1"], "rankline submit"),
    mlflow_absent: (4, ["absent does not exist"], "Make it"),
    mlflow_file_store: (4, ["file store is gone"], "sqlite:///"),
}


@pytest.mark.parametrize("spoil", TABLE, ids=lambda spoil: str(spoil.__name__))
def test_the_table(spoil: Callable[[Case], None], case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    code, words, remedy = TABLE[spoil]
    spoil(case)
    assert main(["run", case.write()]) == code
    message = capsys.readouterr().err
    for word in [*words, remedy]:
        assert word in message
    assert "Traceback" not in message
    assert not (case.store / "_artifacts").exists(), "nothing was begun"
    assert main(["plan", case.write(), "--json"]) == code
    shown = capsys.readouterr()
    assert all(word in json.dumps(shown.out + shown.err) or word in shown.out + shown.err for word in words)


@pytest.fixture
def other_program() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use(case: Case, other_program: int, capsys: pytest.CaptureFixture[str]) -> None:
    case.values["serve"] = {"port": other_program}
    assert main(["run", case.write()]) == 2
    message = capsys.readouterr().err
    assert f"{other_program} on 127.0.0.1 is in use" in message
    assert "Set serve.port" in message


def test_a_port_in_use_for_the_page(case: Case, other_program: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--store", str(case.store)]) == 4
    assert "Run a pipeline first" in capsys.readouterr().err
    (case.store / "_mlflow").mkdir()
    sqlite3.connect(case.store / "_mlflow" / "mlflow.db").close()
    (case.store / "_mlflow" / "mlflow.db").touch()
    assert main(["ui", "--store", str(case.store), "--port", str(other_program)]) == 2
    assert f"port {other_program} is in use" in capsys.readouterr().err


def test_mlflow_locked(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pipelines.tracking_probe.LOCK_WAIT_S", 0.1)
    (case.store / "_mlflow").mkdir()
    database = sqlite3.connect(case.store / "_mlflow" / "mlflow.db", isolation_level=None)
    database.execute("create table runs (a)")
    database.execute("begin immediate")
    assert main(["run", case.write()]) == 4
    message = capsys.readouterr().err
    assert "locked" in message
    assert "End the program that holds it" in message
    assert "Go on with: rankline run" in message
    database.close()


def test_another_driver(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.store / "tiny").mkdir()
    lease = {"pid": 1, "host": "elsewhere", "started": 0, "token": "t"}
    (case.store / "tiny" / "lease.json").write_text(json.dumps(lease))
    assert main(["run", case.write()]) == 4
    assert "driver 1 on elsewhere is at it" in capsys.readouterr().err


def test_reasons_are_told_together(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for spoil in (rank_too_large, row_without_field, ray_token_readable):
        spoil(case)
    assert main(["run", case.write()]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("min(m, n) = 8", "row 10", "chmod 600"))


def test_too_little_disk_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    assert main(["run", case.write()]) == 3
    message = capsys.readouterr().err
    assert "0.0 GiB are free" in message
    assert "larger disk" in message


def test_a_disk_that_is_full_at_the_first_write(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(case.store / "x"))

    monkeypatch.setattr("os.fsync", refuse)
    assert main(["run", case.write()]) == 3
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "set store.path" in message
    assert "Traceback" not in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(case: Case, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 200 * 1024)
    case.values["store"] = {"path": str(small_disk / "store")}
    assert main(["run", case.write()]) == 3
    message = capsys.readouterr().err
    assert str(small_disk) in message
    assert "Traceback" not in message


def test_a_library_that_only_quotes_the_disk() -> None:
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert exit_code(error) == 3
    assert "set store.path" in explain(error, 3)
    assert exit_code(RuntimeError("no space")) == 1


def test_the_table_of_transformers_is_its_own() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_model_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_gguf_headers_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    from lowrank.errors import CheckpointError

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "bc"])
    writer.add_array("scores", [1.5, 2.5, 3.5])
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((6, 4), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [(tensor.name, tensor.shape) for tensor in gguf_headers(path)] == [
        ("blk.0.attn_q.weight", (6, 4)),
        ("output_norm.weight", (4,)),
    ]
    data = path.read_bytes()
    for damaged in (data[:40], data[:-60], b"GGML" + data[4:], data.replace(b"llama", b"lemma")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            gguf_headers(path)
