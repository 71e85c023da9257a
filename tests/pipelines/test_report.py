"""The page, the card and the plots, from inputs with the stages' schemas, with and without what may be missing."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.card import code, pair, table, verdict
from pipelines.config import PipelineConfig, parse
from pipelines.plots import by_kind, layer_kinds, read_layers
from pipelines.report import model_card, redact, write_plots, write_report

VARIANTS = ("dense", "nf4", "nf4_init", "adapter")
STAGES = ("shard", "decompose", "quantize", "finetune", "evaluate", "register")
HOSTILE = "<script>alert('&')</script> </pre><img src=http://evil.example/x>"
VOID = {"meta", "br", "path", "use", "img"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


def config(**changes: Any) -> PipelineConfig:
    base = {
        "name": "tiny",
        "model": {"source": "hub:acme/tiny"},
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
    }
    return parse(base | changes)


def evaluation(labels: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, name in enumerate(VARIANTS):
        loss = (6.1, 6.6, 6.46, 0.58)[index]
        found[name] = {"loss": loss, "perplexity": math.exp(loss), "accuracy": None, "num_tokens": 600, "num_rows": 300}
        if labels:
            found[name] |= {
                "accuracy": (0.62, 0.6, 0.613, 0.727)[index],
                "calibrated_log_loss": 0.6,
                "label_log_loss": 1,
            }
    found |= {"labels": ["no", "yes"] if labels else [], "metric": "loss", "improvement": 5.88, "passed": True}
    answers = {"nf4_init": HOSTILE, "adapter": "yes", "dense": "", "nf4": ""}
    found["samples"] = [
        {"row": 0, "variant": name, "prompt": HOSTILE, "expected": "yes", "got": got} for name, got in answers.items()
    ]
    if labels:
        gain = {"difference": 0.1, "low": 0.04, "high": 0.16, "num_rows": 300.0}
        found["majority"] = {"label": "yes", "accuracy": 0.62}
        found["gains"] = dict.fromkeys(("dense", "nf4", "nf4_init"), gain) | {"majority": gain | {"low": -0.01}}
    return found


def summary(found: dict[str, Any], endpoint: bool = True) -> dict[str, Any]:
    facts: dict[str, dict[str, Any]] = {
        "shard": {"num_parameters": 1_000_000, "model_type": "gpt2"},
        "decompose": {"mean_rank": 4.0},
        "quantize": {"num_tensors": 4, "num_fallback": 1, "dense_bytes": 4e6, "packed_bytes": 5e5, "factor_bytes": 1e5},
        "finetune": {"num_parameters": 5000},
        "evaluate": found,
        "register": {},
    }
    record = {"key": "0123456789abcdef0123", "cached": False, "seconds": 4.2, "peak_rss_bytes": 1 << 28, "units": 5}
    record |= {"units_done": 5, "manifest_sha256": "ab" * 32}
    deployed = {"url": "http://127.0.0.1:8000", "model_ids": ["base", "tiny"], "token_file": "/runs/_serve_token"}
    return {
        "name": "tiny",
        "run_key": "feed",
        "seconds": 61.0,
        "losses": {v: found[v]["loss"] for v in VARIANTS},
        "perplexity": {v: found[v]["perplexity"] for v in VARIANTS},
        "accuracy": {v: found[v]["accuracy"] for v in VARIANTS}
        | {"majority": found.get("majority", {}).get("accuracy")},
        "calibrated_log_loss": {v: found[v].get("calibrated_log_loss") for v in VARIANTS},
        "gains": found.get("gains"),
        "passed": found["passed"],
        "stages": {name: record | {"facts": facts[name]} for name in STAGES},
        "registered": {"name": "tiny", "version": "2", "alias": None, "reason": "'champion' stays at version 1: worse"},
        "endpoint": deployed if endpoint else None,
        "mlflow": {"uri": "postgresql://user:hunter2@db/mlflow", "run_id": "cafe"},
    }


def artifacts(root: Path, found: dict[str, Any], modules: list[str], log: bool = True) -> dict[str, Path]:
    paths = {name: root / name for name in STAGES}
    for stage in ("decompose", "quantize"):
        (paths[stage] / "units" / "index").mkdir(parents=True)
    ranks = [3 + (i > 0) for i in range(len(modules))]
    fits = [
        {"module": m, "shape": [8, 6], "rank": r, "explained_energy": 0.5, "relative_error": 0.7}
        for m, r in zip(modules, ranks)
    ]
    spectra = [{"module": m, "index": i, "sigma": 0.0 if i == 4 else 2.0**-i} for m in modules for i in range(5)]
    errors = [{"module": m, "shape": [8, 6], "plain_error": 0.09, "quantization_error": 0.08} for m in modules]
    for stage, name, rows in (
        ("decompose", "index", fits),
        ("decompose", "spectra", spectra),
        ("quantize", "index", errors),
    ):
        pq.write_table(pa.Table.from_pylist(rows), paths[stage] / "units" / "index" / f"{name}.parquet")
    (paths["evaluate"] / "units" / "summary").mkdir(parents=True)
    (paths["evaluate"] / "units" / "summary" / "evaluation.json").write_text(json.dumps(found))
    paths["finetune"].mkdir()
    if log:
        (paths["finetune"] / "metrics.jsonl").write_text("\n".join(map(json.dumps, metric_lines())))
    return paths


def metric_lines() -> list[dict[str, Any]]:
    first = [{"event": "step", "step": s, "attempt": 1, "loss": 99.0, "lr": 1e-4, "seconds": 1.0} for s in (1, 2, 3)]
    later = [
        {"event": "step", "step": s, "attempt": 2, "loss": 3.0 / s, "lr": 1e-4, "seconds": 1.0, "tokens": 10}
        | {"tokens_per_second": 10.0, "grad_norm": 1.0, "heldout_loss": 2.0 / s}
        for s in (2, 3, 4)
    ]
    return [*first, {"event": "resume", "step": 1, "attempt": 2}, *later]


GPT2 = [
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.1.attn.c_attn",
    "transformer.h.0.mlp.c_proj",
]


def render(root: Path, found: dict[str, Any], modules: list[str], endpoint: bool = True, log: bool = True) -> str:
    path = root / "report.html"
    write_report(path, config(), summary(found, endpoint), artifacts(root, found, modules, log))
    return path.read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(tmp_path_factory.mktemp("full"), evaluation(), GPT2)


def test_page_parses_and_tells_the_run(full: str) -> None:
    page = Page(full)
    for text in (
        "The adapter lowers held-out loss from 6.46 to 0.58 and",
        "raises accuracy from 61.3 % to 72.7 % (majority class 62.0 %).",
        "Gate passed",
        "'champion' stays at version 1: worse",
        "6.7× smaller",
        "not told apart",
        "attn.c_proj",
        "c_attn",
        "3 to 4",
        "4 optimizer steps",
        "Authorization: Bearer $(cat /runs/_serve_token)",
        "target_modules: all-linear",
    ):
        assert text in page.text, text
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_loaded_or_run(full: str) -> None:
    page = Page(full)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object", "image", "base", "form"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert "@import" not in full
    assert "url(http" not in full


def test_what_users_wrote_is_shown_not_obeyed(full: str) -> None:
    assert "<script" not in full
    assert "&lt;script&gt;" in full
    assert HOSTILE in "".join(Page(full).words)
    assert "hunter2" not in full


def test_free_text_without_labels_endpoint_or_log(tmp_path: Path) -> None:
    page = Page(render(tmp_path, evaluation(labels=False), ["lm.proj"], endpoint=False, log=False))
    assert "from 6.46 to 0.58." in page.text
    assert "there is no accuracy" in page.text
    assert "not deployed" in page.text
    assert "optimizer steps" not in page.text
    assert "curl " not in page.text


def test_page_without_any_artifact(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", config(), summary(evaluation()), {})
    assert "Quality on held-out rows" in Page((tmp_path / "report.html").read_text()).text


def test_plots_are_deterministic(tmp_path: Path) -> None:
    paths = artifacts(tmp_path, evaluation(), GPT2)
    write_plots(paths, tmp_path / "a")
    write_plots(paths, tmp_path / "b")
    names = {"spectra.png", "quantization_error.png", "loss.png", "accuracy.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_plots_leave_out_what_there_is_not(tmp_path: Path) -> None:
    write_plots(artifacts(tmp_path, evaluation(labels=False), ["lm.proj"], log=False), tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"spectra.png", "quantization_error.png"}


def test_card_is_deterministic_markdown_with_front_matter() -> None:
    tags = {"rankline.key.evaluate": "e" * 20, "rankline.base_sha256": "a" * 64, "rankline.key": "k" * 20}
    text = model_card(config(), evaluation(), tags)
    assert text == model_card(config(), evaluation(), dict(tags))
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["base_model"] == "acme/tiny"
    assert head["library_name"] == "peft"
    assert 'PeftModel.from_pretrained(model, "plain_lora")' in body
    assert "a" * 64 in body
    assert "| `adapter`: the quantized base with this adapter | 0.5800 |" in body
    assert "gain in accuracy over `majority` includes zero" in body


def test_card_without_accuracy_and_with_hostile_values() -> None:
    odd = config(model={"source": "/models/a|b`c"}, data={"train": "t", "heldout": "h", "labels": ["|<b>", "`"]})
    text = model_card(odd, evaluation(labels=False), {})
    assert "free text" in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("| `data."))
    assert code("a`b") == "`` a`b ``"
    assert table(["a", "b"], [["1", "2"]], numbers=True).splitlines() == ["| a | b |", "|---|---:|", "| 1 | 2 |"]


def plain(found: dict[str, Any]) -> str:
    """The verdict without the spaces that keep a number and its unit on one line."""
    return verdict(found).replace("\u00a0", " ")


def test_verdict_says_what_happened() -> None:
    found = summary(evaluation())
    found["accuracy"] |= {"nf4_init": 0.7, "adapter": 0.6}
    assert "but lowers accuracy from 70.0 % to 60.0 %" in plain(found)
    found["losses"] |= {"nf4_init": 2.3456, "adapter": 2.3461}
    assert "raises held-out loss from 2.3456 to 2.3461 " in plain(found)
    assert "cannot be told apart from that of the majority class (95 % interval −1.0 to +16.0 points)" in plain(found)
    found["gains"] = None
    assert plain(found).endswith("(majority class 62.0 %).")
    assert pair(1.0, 1.0)[:2] == ("1", "1")


def test_layer_kinds_of_any_naming() -> None:
    kinds = layer_kinds([*GPT2, "model.layers.3.experts.7.w1", "proj", "blocks.2"])
    assert kinds["transformer.h.1.attn.c_attn"] == ("c_attn", 1)
    assert kinds["transformer.h.0.attn.c_proj"] == ("attn.c_proj", 0)
    assert kinds["transformer.h.0.mlp.c_proj"] == ("mlp.c_proj", 0)
    assert kinds["model.layers.3.experts.7.w1"] == ("w1", 3)
    assert kinds["proj"] == ("proj", 0)
    assert kinds["blocks.2"][1] == 2


def test_layers_join_the_tables_of_both_stages(tmp_path: Path) -> None:
    layers = read_layers(artifacts(tmp_path, evaluation(), GPT2))
    assert [layer.module for layer in layers] == GPT2
    assert layers[0].sigmas[:2] == (1.0, 0.5)
    assert (layers[1].rank, layers[1].plain_error, layers[1].split_error) == (4, 0.09, 0.08)
    assert list(by_kind(layers)) == ["c_attn", "attn.c_proj", "mlp.c_proj"]


def test_redact_hides_credentials_only() -> None:
    assert redact("postgresql://me:secret@db:5432/x") == "postgresql://***@db:5432/x"
    assert redact("sqlite:////runs/_mlflow/mlflow.db") == "sqlite:////runs/_mlflow/mlflow.db"
