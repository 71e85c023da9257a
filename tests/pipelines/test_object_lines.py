"""The whole line on S3 from the command line: equal bytes, and on with it from a machine that has nothing of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lines import (
    EXACT,
    Driver,
    assert_nothing_done_twice,
    events,
    run_serially,
    stage_units,
    store_of,
    unit_hashes,
    with_changes,
)
from object_stores import settings
from resumed import KILLS, STAGES, assert_resumed

from cluster import data
from cluster.tokens import TOKENS_FILE
from pipelines import PipelineConfig, run
from pipelines.cli import main
from pipelines.config import parse, to_dict
from pipelines.errors import ConfigError, LeaseError, exit_code
from pipelines.lease_database import LeaseDatabase, lease_url
from pipelines.run_lease import CLEARING, run_id, run_lease

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


def on_s3(whole_line: Any, s3: Any, root: Path, **more: Any) -> PipelineConfig:
    """The tiny line in a store of its own on S3."""
    return with_changes(whole_line.config, **settings(s3.uri(), root), **more)


def machine(config: PipelineConfig, cache: Path) -> PipelineConfig:
    """The same run on another machine, which has nothing of it yet."""
    return with_changes(config, store={"cache": str(cache)})


def write(config: PipelineConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(to_dict(config)))
    return str(path)


@pytest.fixture(scope="module")
def finished(whole_line: Any, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """The line, run to its end through the command line."""
    config = on_s3(whole_line, s3, tmp_path_factory.mktemp("s3") / "first")
    driver = Driver(config)
    assert driver.wait(400) == 0, driver.text()
    return config


def test_the_bytes_are_those_of_a_local_store(finished: PipelineConfig, whole_line: Any, s3: Any) -> None:
    assert_resumed(finished, whole_line, {})
    for stage in EXACT:
        ours, theirs = stage_units(finished, stage), stage_units(whole_line.config, stage)
        for unit in unit_hashes(finished, stage):
            for file, digest in theirs.read(unit).files.items():
                key = ours.root / "payload" / unit / digest
                assert store_of(finished).mirror.get(key) == (theirs.path(unit) / file).read_bytes(), f"{unit} {file}"
    keys = s3.keys(finished.store.path)
    assert {"tiny/run.json", "tiny/pipeline.yaml", "tiny/summary.json", "tiny/report.html"} <= set(keys)
    assert {key.partition("/")[0] for key in keys} == {"_artifacts", "_registries.json", "tiny"}, "no token, no lease"
    ledgers = [key for key in keys if "/ledger/" in key]
    assert 0 < len(ledgers) < 40


def test_no_credential_is_written_anywhere(finished: PipelineConfig) -> None:
    secrets = {os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    places = [path for path in store_of(finished).root.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")]
    for path in [*places, *store_of(finished).root.parent.glob("*.log")]:
        text = path.read_text(errors="replace")
        assert not any(secret in text for secret in secrets), path


def test_another_machine_resumes_shows_and_verifies(
    finished: PipelineConfig, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {stage: events(finished, stage, "start") for stage in STAGES}
    place = ["--store", finished.store.path, "--cache", str(tmp_path / "resumed")]
    assert main(["resume", "tiny", *place, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert all(stage["cached"] for stage in summary["stages"].values())
    assert {stage: events(finished, stage, "start") for stage in STAGES} == before
    assert (tmp_path / "resumed" / "tiny" / "report.html").stat().st_size > 10_000
    place = ["--store", finished.store.path, "--cache", str(tmp_path / "shown"), "--json"]
    assert main(["status", *place]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["status"], run["driver"]) == ("FINISHED", None)
    assert {stage["name"]: stage["units"] for stage in run["stages"]}.items() >= {
        stage: len(unit_hashes(finished, stage)) for stage in EXACT
    }.items()
    assert main(["verify", "tiny", *place]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["state"] for stage in found["stages"]] == ["whole"] * len(STAGES)
    assert main(["export", "tiny", "--out", str(tmp_path / "lora"), *place]) == 0
    capsys.readouterr()
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_a_corrupted_object_is_found_by_verify(
    finished: PipelineConfig, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = stage_units(finished, "quantize")
    unit = next(iter(unit_hashes(finished, "quantize")))
    name = f"_artifacts/quantize/{units.root.name}/payload/{unit}/{next(iter(units.read(unit).files.values()))}"
    url = s3.change(finished.store.path, name)
    try:
        place = ["--store", finished.store.path, "--cache", str(tmp_path / "cache")]
        assert main(["verify", "tiny", *place, "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["problems"] == [f"{url} is damaged: its sha256 does not match"]
    finally:
        s3.change(finished.store.path, name)  # flipped back


@pytest.mark.slow
def test_killed_and_begun_again_with_nothing(whole_line: Any, s3: Any, tmp_path: Path) -> None:
    config = on_s3(whole_line, s3, tmp_path / "first")
    for number, stage in enumerate(("decompose", "finetune")):
        here = machine(config, tmp_path / str(number) / "cache")
        driver = Driver(here)
        driver.until(driver.logged(stage, *KILLS[stage]))
        with pytest.raises(LeaseError, match=r"is at it") as refused:
            run(machine(config, tmp_path / "other" / "cache"), quiet=True)
        assert exit_code(refused.value) == 4
        driver.kill()
        shutil.rmtree(store_of(here).root)
    again = machine(config, tmp_path / "again" / "cache")
    driver = Driver(again)
    assert driver.wait(400) == 0, driver.text()
    for stage in STAGES:
        assert_nothing_done_twice(again, stage)
        if stage != "finetune":
            assert set(events(again, stage, "commit").values()) == {1}, stage
    for stage in EXACT:
        assert unit_hashes(again, stage) == unit_hashes(whole_line.config, stage), stage
    summary = json.loads((store_of(again).run_dir("tiny") / "summary.json").read_text())
    assert summary["losses"] == pytest.approx(whole_line.result.summary["losses"], abs=1e-4)


@pytest.mark.slow
def test_the_server_goes_away_and_comes_back(whole_line: Any, s3: Any, tmp_path: Path) -> None:
    config = on_s3(whole_line, s3, tmp_path / "first")
    driver = Driver(config)
    driver.until(driver.logged("decompose", "commit"))
    s3.stop()
    try:
        assert driver.wait(120) == 3, driver.text()
        assert "it does not answer. Check the network" in " ".join(driver.text().split())
        assert "Traceback" not in driver.text()
        assert "Go on with: rankline run" in driver.text()
    finally:
        s3.start()
    again = Driver(config)
    assert again.wait(400) == 0, again.text()
    for stage in EXACT:
        assert unit_hashes(config, stage) == unit_hashes(whole_line.config, stage), stage
        assert_nothing_done_twice(config, stage)


@pytest.mark.slow
def test_the_line_on_gcs(whole_line: Any, gcs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_changes(whole_line.config, **settings(gcs.uri(), tmp_path / "first"))
    driver = Driver(config)
    assert driver.wait(400) == 0, driver.text()
    assert_resumed(config, whole_line, {})
    place = ["--store", config.store.path, "--cache", str(tmp_path / "another"), "--json"]
    assert main(["status", *place]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["status"]) == ("tiny", "FINISHED")
    assert main(["verify", "tiny", *place]) == 0
    assert [stage["state"] for stage in json.loads(capsys.readouterr().out)["stages"]] == ["whole"] * len(STAGES)
    other = with_changes(machine(config, tmp_path / "other"), quantize={"double_quant": False}, name="other")
    run_serially(other, *EXACT)
    assert main(["gc", "--delete", *place]) == 0
    (lost,) = json.loads(capsys.readouterr().out)["garbage"]
    assert Path(lost["path"]).parts[-2:] == ("quantize", stage_units(other, "quantize").root.name)
    assert not stage_units(other, "quantize").all_committed()
    assert stage_units(config, "quantize").all_committed()


@pytest.mark.usefixtures("ray_head")
def test_ray_data_finds_the_tokenizer_there(
    whole_line: Any, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_s3(whole_line, s3, tmp_path / "rows")
    run_serially(config, "shard")
    units, found = stage_units(config, "shard"), list[bytes]()
    for least in (2**40, 0):
        monkeypatch.setattr(data, "WORTH_RAY_BYTES", least)
        out = tmp_path / str(least)
        out.mkdir()
        shutil.rmtree(units.path("meta"), ignore_errors=True)
        data.prepare_tokens(config.data.heldout, units, config.data, out, use_ray=True)
        found.append((out / TOKENS_FILE).read_bytes())
    assert found[0] == found[1]


@pytest.fixture
def planned(whole_line: Any, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plans a pipeline with changes; the exit code and what was said."""

    def plan(**changes: Any) -> tuple[int, str]:
        config = on_s3(whole_line, s3, tmp_path / "plan", cluster={"address": None})
        code = main(["plan", write(with_changes(config, **changes), tmp_path / "p.yaml")])
        told = capsys.readouterr()
        return code, " ".join((told.out + told.err).split())

    return plan


def test_what_an_object_store_cannot_do_is_told_by_plan(planned: Any, s3: Any, tmp_path: Path) -> None:
    code, said = planned()
    assert code == 0, said
    code, said = planned(register={"tracking_uri": None})
    assert code == 2
    assert "register.tracking_uri: null keeps MLflow's database in the store" in said
    assert "register.tracking_uri (null) is none" in said
    code, said = planned(store={"path": s3.uri().replace("s3://rankline/", "s3://nowhere/")})
    assert code == 3
    assert "there is no such bucket" in said
    code, said = planned(store={"lease": f"sqlite:///{tmp_path}/none/l.db"})
    assert code == 4
    assert "Check store.lease" in said


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_store_that_is_gone_is_told_in_seconds(planned: Any, kind: str, request: pytest.FixtureRequest) -> None:
    server: Any = request.getfixturevalue(kind)
    server.stop()
    try:
        began = time.monotonic()
        code, said = planned(store={"path": server.uri()})
        assert time.monotonic() - began < 40
    finally:
        server.start()
    assert code == 3
    assert "it does not answer" in said


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ({"path": "s3://key:hunter2@bucket/p"}, "store.path: holds credentials"),
        ({"path": "s3://key@bucket/p"}, "store.path: holds credentials"),
        ({"path": "s3://bucket/p?secret_key=hunter2"}, "store.path: holds credentials"),
        ({"path": "ftp://bucket/p"}, "store.path: got ftp://; allowed are a directory and s3://"),
        ({"path": "s3://bucket"}, "store.path: names no bucket or no prefix"),
        ({"path": "s3:///p"}, "store.path: names no bucket or no prefix"),
        ({"lease": "postgresql+psycopg2://me:hunter2@db/x"}, "store.lease: holds a password"),
        ({"lease": "postgresql+psycopg2://me@db/x?password=hunter2"}, "store.lease: holds a password"),
        ({"lease": "leases.db"}, "store.lease: is no SQLAlchemy URL"),
    ],
)
def test_no_secret_is_taken_in(store: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"name": "a", "model": {"source": "m"}, "data": {"train": "t", "heldout": "h"}, "store": store}
    with pytest.raises(ConfigError) as caught:
        parse(values)
    assert any(problem.startswith(told) for problem in caught.value.problems)
    assert "hunter2" not in str(caught.value)
    if "path" in store:
        assert main(["status", "--store", store["path"]]) == 2
        assert "hunter2" not in capsys.readouterr().err


def test_gc_takes_what_nobody_needs_and_gives_way(
    finished: PipelineConfig, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_changes(machine(finished, tmp_path / "other"), quantize={"double_quant": False}, name="other")
    run_serially(other, *EXACT)
    lost = stage_units(other, "quantize").root
    kept = s3.keys(finished.store.path, "_artifacts/decompose")
    place = ["--store", finished.store.path, "--cache", str(tmp_path / "gc")]
    database = LeaseDatabase(lease_url(finished))
    store = store_of(finished)
    with database.held(run_id(store, "a-new-run")):
        assert main(["gc", "--delete", *place]) == 4
        assert "is at run a-new-run" in capsys.readouterr().err
    with (
        database.held(run_id(store, CLEARING)),
        pytest.raises(LeaseError, match="`rankline gc` is at this store"),
        run_lease(finished, store),
    ):
        pass
    assert main(["gc", *place]) == 0
    assert f"quantize/{lost.name}" in capsys.readouterr().out
    assert s3.keys(finished.store.path, f"_artifacts/quantize/{lost.name}")
    assert main(["gc", "--delete", *place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]).parts[-2:] for one in found["garbage"]] == [("quantize", lost.name)]
    assert not s3.keys(finished.store.path, f"_artifacts/quantize/{lost.name}")
    assert s3.keys(finished.store.path, "_artifacts/decompose") == kept
    assert main(["verify", "tiny", *place]) == 0
    capsys.readouterr()
