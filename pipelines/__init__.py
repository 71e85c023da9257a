"""rankline: from a pretrained transformer to a served, fine-tuned adapter, in one durable line on a Ray cluster.

from pipelines import PipelineConfig, run

config = PipelineConfig.from_yaml("pipelines/configs/demo.yaml")
result = run(config)
print(result.summary["losses"], result.endpoint)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.config import PipelineConfig
    from pipelines.workflow import RunResult, run

__all__ = ["PipelineConfig", "RunResult", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `rankline --help` is instant."""
    if name == "PipelineConfig":
        from pipelines.config import PipelineConfig

        return PipelineConfig
    if name in ("run", "RunResult"):
        from pipelines import workflow

        return getattr(workflow, name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
