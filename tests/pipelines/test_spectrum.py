"""`rankline spectrum`: exact spectra of a tiny model, tables, picture, JSON, ranks for a budget, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lines import make_model_dir
from safetensors.torch import load_file, save_file
from tolerance import tol

from lowrank.errors import NumericsError
from lowrank.spectra import energy_curve, ranks_for, singular_values, stable_rank
from pipelines import spectrum, spectrum_view
from pipelines.cli import main

TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("spectrum"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("spectrum"), "gpt2", dtype=torch.bfloat16)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main(["spectrum", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


class TestNumerics:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(40, 25), (25, 40), (1, 7), (5000, 3), (3, 5000)], ids=str)
    def test_singular_values_are_lapacks(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(singular_values("w", matrix), expected, rtol=tol(torch.float64), atol=0)

    def test_figures_of_a_known_spectrum(self) -> None:
        sigma = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
        assert stable_rank(sigma) == pytest.approx(14 / 9)
        assert energy_curve(sigma).tolist() == pytest.approx([0, 9 / 14, 13 / 14, 1, 1])
        assert ranks_for(sigma, [0.5, 9 / 14, 0.65, 1.0]) == [1, 1, 2, 3]

    def test_a_zero_matrix(self) -> None:
        sigma = singular_values("w", torch.zeros(3, 2))
        assert stable_rank(sigma) == 0.0
        assert energy_curve(sigma).tolist() == [1.0, 1.0, 1.0]
        assert ranks_for(sigma, [0.9]) == [0]

    def test_a_damaged_weight_is_named(self) -> None:
        with pytest.raises(NumericsError, match="singular values of w: 1 of 4 entries are NaN"):
            singular_values("w", torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


class TestCommand:
    def test_every_figure_is_that_of_the_stored_weights(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = run_json(capsys, str(model), "--out", str(tmp_path / "s.png"))
        stored = load_file(model / "model.safetensors")
        assert list(found["types"]) == TYPES
        assert found["num_weights"] == len(found["weights"]) == 14
        for row in found["weights"]:
            weight = stored[f"{row['name']}.weight"].double()
            s = torch.linalg.svdvals(weight)
            assert row["shape"] == list(weight.shape)
            assert row["name"] == f"model.layers.{row['layer']}.{row['name'].split('.')[3]}.{row['type']}"
            assert row["stable_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2))
            assert row["energy"]["8"] == pytest.approx(float(s[:8].square().sum() / s.square().sum()))
            assert row["energy"]["128"] == pytest.approx(1.0)
            assert row["rank_for"] == {
                share: int((s.square().cumsum(0) < float(share) * s.square().sum()).sum()) + 1
                for share in ("0.5", "0.8", "0.9", "0.95")
            }
        assert found["num_parameters"] == sum(row["shape"][0] * row["shape"][1] for row in found["weights"])
        q = [row["stable_rank"] for row in found["weights"] if row["type"] == "q_proj"]
        assert found["types"]["q_proj"]["stable_rank"] == {"mean": sum(q) / 2, "min": min(q), "max": max(q)}
        assert found["allocation"] is None
        assert found["picture"] == str(tmp_path / "s.png")

    def test_tables_and_picture(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "deep" / "s.png"
        assert main(["spectrum", str(model), "--out", str(out), "--top", "3", "--budget", "0.5"]) == 0
        text = capsys.readouterr().out
        assert all(f"\n {kind} " in text for kind in TYPES)
        assert text.count("model.layers.") == 3
        assert "the 3 weights of smallest stable rank" in text
        assert "ranks for 50 % of the numbers" in text
        assert "predicted relative error over all weights" in text
        first = out.read_bytes()
        assert first.startswith(b"\x89PNG")
        assert main(["spectrum", str(model), "--out", str(out), "--top", "0"]) == 0
        assert out.read_bytes() == first, "equal weights, equal bytes"
        assert "\nall weights" in capsys.readouterr().out

    def test_transposed_weights_and_other_types(
        self, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = run_json(capsys, str(gpt2), "--out", str(tmp_path / "s.png"))
        assert found["types"]["c_attn"]["shapes"] == [[48, 16]]
        assert {row["layer"] for row in found["weights"]} == {0, 1}

    def test_a_budget_is_kept_and_beats_one_rank_for_all(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = run_json(capsys, str(model), "--out", str(tmp_path / "s.png"), "--budget", "0.4")
        chosen, shapes = found["allocation"], {row["name"]: row["shape"] for row in found["weights"]}
        spent = sum(rank * sum(shapes[name]) for name, rank in chosen["ranks"].items())
        assert spent == chosen["num_parameters"] <= 0.4 * found["num_parameters"]
        assert chosen["uniform"]["num_parameters"] <= 0.4 * found["num_parameters"]
        assert chosen["best_error"] <= chosen["relative_error"] < chosen["uniform"]["relative_error"]
        stored = load_file(model / "model.safetensors")
        lost = total = 0.0
        for name, rank in chosen["ranks"].items():
            squares = torch.linalg.svdvals(stored[f"{name}.weight"].double()).square()
            lost, total = lost + float(squares[rank:].sum()), total + float(squares.sum())
        assert chosen["relative_error"] == pytest.approx((lost / total) ** 0.5)

    def test_targets(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = str(tmp_path / "s.png")
        found = run_json(capsys, str(model), "--out", out, "--target", "q_proj", "--target", ".*layers.1.mlp.*")
        assert {row["type"] for row in found["weights"]} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
        assert found["num_weights"] == 5


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--budget", "1.5"], "--budget 1.5. Give a share"),
            (["--budget", "0.001"], "--budget 0.001 is too small: .* the least ranks take"),
            (["--top", "-1"], "--top -1"),
            (["--out", "spectrum.pdf"], "spectrum.pdf is not a .png file"),
            (["--target", "nothing"], "'nothing' matches no linear layer"),
        ],
    )
    def test_settings(
        self, arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "s.png")]
        error = run_json(capsys, str(model), *given, code=2)["error"]
        assert re.search(message, error.replace("\n", " "))
        assert not (tmp_path / "s.png").exists()

    def test_a_picture_below_a_file(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        assert (
            "is in the way" in run_json(capsys, str(model), "--out", str(tmp_path / "file" / "s.png"), code=2)["error"]
        )
        (tmp_path / "s.png").mkdir()
        assert "is in the way" in run_json(capsys, str(model), "--out", str(tmp_path / "s.png"), code=2)["error"]

    def test_no_model_and_a_damaged_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "does not exist" in run_json(capsys, str(tmp_path / "nowhere"), code=2)["error"]
        damaged = make_model_dir(tmp_path)
        weights = load_file(damaged / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
        save_file(weights, damaged / "model.safetensors", {"format": "pt"})
        error = run_json(capsys, str(damaged), "--out", str(tmp_path / "s.png"), code=5)["error"]
        assert "singular values of model.layers.1.mlp.up_proj.weight: 1 of 384 entries" in error


def test_a_model_of_many_types_and_one_layer_still_draws(tmp_path: Path) -> None:
    sigma = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    weights = [spectrum.Weight(f"w{i}", f"type_{i}$", 0, (3, 4), sigma * (i + 1)) for i in range(14)]
    zero = spectrum.Weight("zero", "zero", 0, (3, 4), torch.zeros(3, dtype=torch.float64))
    for given in (weights, [weights[0]], [zero]):
        spectrum_view.picture(given, tmp_path / "s.png")
        assert (tmp_path / "s.png").stat().st_size > 1000
        (tmp_path / "s.png").unlink()
    assert spectrum.report("m", weights)["types"]["type_3$"]["count"] == 1


def test_help_and_parsing_load_nothing_heavy() -> None:
    code = "import sys; from pipelines.cli import build_parser; build_parser().parse_args(['spectrum', 'm']); "
    code += "print(sorted({'torch', 'matplotlib', 'rich', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
