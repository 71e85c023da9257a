"""Which models transformers can train as causal language models, without importing it (that takes torch, seconds).

A first check for `rankline plan`; `cluster.architecture.load_config` asks transformers itself before work begins.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cluster.errors import ModelError
from lowrank.reading import read_json, shown

_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@cache
def causal_model_types() -> frozenset[str]:
    """Model types with a causal language model, read from transformers' source; empty when it is not to be found."""
    spec = find_spec("transformers")
    root = Path(spec.origin).parent if spec and spec.origin else Path()
    try:
        tree = ast.parse((root / "models" / "auto" / "modeling_auto.py").read_text())
    except (OSError, SyntaxError):
        return frozenset()
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == _TABLE:
            pairs = [item for item in ast.walk(node) if isinstance(item, ast.Tuple) and item.elts]
            return frozenset(str(p.elts[0].value) for p in pairs if isinstance(p.elts[0], ast.Constant))
    return frozenset()


def check_config(directory: Path) -> None:
    """Refuse a model directory that `load_config` would refuse later.

    Raises:
        ModelError: config.json is damaged, of an unknown architecture, or of an already quantized model.
    """
    path = directory / "config.json"
    try:
        config = read_json(path)
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"load model {directory}: config.json cannot be read ({error}). Copy it again.") from error
    if not isinstance(model_type, str):
        raise ModelError(f"load model {directory}: config.json has the model_type {shown(model_type)}. Copy it again.")
    known = causal_model_types()
    if known and model_type not in known:
        raise ModelError(
            f"load model {directory}: model_type {shown(model_type)} has no causal language model in transformers. "
            "Give a decoder such as Llama, Mistral, Qwen2 or GPT-2; models that bring their own code are refused."
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"load model {directory}: the checkpoint is already quantized. Give the original in float32, bfloat16 or "
            "float16; rankline quantizes it itself."
        )
