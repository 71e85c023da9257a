"""A run in words: the verdict, how figures are written, and the model card.

The card is a Hugging Face README that says what the adapter is, what it scored, and how to load it. It is part
of a content-addressed bundle, so that it holds no time, no path of this machine and no run id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pipelines.config import PipelineConfig, result_fields

DASH = "–"
_SPLITS = {"qpissa": "QPiSSA", "loftq": "LoftQ", "lq_lora": "LQ-LoRA", "lplr": "LPLR, with L and R in NF4 as well"}
VARIANTS = {
    "dense": "the original model",
    "nf4": "every target layer in plain NF4",
    "nf4_init": "the quantized base with the initial factors, before training",
    "adapter": "the quantized base with this adapter",
}


def model_card(config: PipelineConfig, evaluation: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """The model card of a registered version, in Markdown; equal inputs give equal text.

    Args:
        config: The pipeline that made it.
        evaluation: What `evaluate` left: figures per variant, labels, gains, verdict.
        tags: Lineage: `rankline.key.<stage>` and the hashes of model and data.
    """
    parts = [
        _front_matter(config),
        f"# {config.register.name or config.name}",
        _intro(config, evaluation),
        "## Results\n\n" + _results(evaluation),
        "## Use\n\n" + _usage(config),
        "## Training\n\n" + _training(config),
        "## Data and lineage\n\n" + _lineage(tags),
        "## Limitations\n\n" + _limitations(config, evaluation),
    ]
    return "\n\n".join(parts) + "\n"


def base_model(config: PipelineConfig) -> str:
    """The base model as others know it: the id on the hub, the package, or the last part of a path."""
    kind, colon, rest = config.model.source.partition(":")
    if colon and kind in ("hub", "package"):
        return rest
    return PurePath(config.model.source).name or config.model.source


def code(value: Any) -> str:
    """Inline code that no value can break out of, in running text or in a table."""
    text = " ".join(str(value).split()).replace("|", "¦")
    fence = "``" if "`" in text else "`"
    pad = " " if fence == "``" else ""
    return f"{fence}{pad}{text.replace('``', '` `')}{pad}{fence}"


def judged_by(evaluation: Mapping[str, Any]) -> str:
    """What the gate compared: the metric asked for, or the loss where there is no accuracy."""
    known = (evaluation.get("adapter") or {}).get("accuracy") is not None
    return "accuracy" if evaluation.get("metric") == "accuracy" and known else "loss"


def _front_matter(config: PipelineConfig) -> str:
    import yaml

    values = {
        "base_model": base_model(config),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "nf4", "quantization", "rankline"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _intro(config: PipelineConfig, evaluation: Mapping[str, Any]) -> str:
    gate = "passed" if evaluation["passed"] else "did not pass"
    return (
        f"A {config.finetune.adapter.method} adapter for {code(base_model(config))}, made by rankline. "
        f"{_base(config)} "
        f"It {gate} the pipeline's gate, which compares {judged_by(evaluation)} on held-out rows "
        "with the same base before training."
    )


def _base(config: PipelineConfig) -> str:
    if config.decompose.mode == "replace":
        return f"It holds the target layers themselves: their {config.decompose.method} factors, healed by training."
    if config.finetune.base == "dense":
        return "It was trained over the original dense weights."
    product = config.quantize.part == "structured"
    split = f"split W = S + E with S a {config.decompose.method} product" if product else "low-rank split W = L·R + E"
    residual = f"the residual of a {split}, with E in NF4 ({_SPLITS.get(config.quantize.method)})"
    stored = residual if config.quantize.method in _SPLITS else "NF4"
    return f"It was trained over a 4-bit base: every target layer is stored as {stored}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table; of numbers, all columns but the first are aligned to the right."""
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _results(evaluation: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{code(name)}: {meaning}",
            f"{evaluation[name]['loss']:.4f}",
            f"{evaluation[name]['perplexity']:.4g}",
            percent(evaluation[name].get("accuracy")),
            number(evaluation[name].get("calibrated_log_loss")),
        ]
        for name, meaning in VARIANTS.items()
    ]
    majority = evaluation.get("majority") or {}
    if majority:
        rows.append([f"always {code(majority['label'])} (majority class)", "", "", percent(majority["accuracy"]), ""])
    counted = evaluation["adapter"]
    head = ["model", "loss, nats/token", "perplexity", "accuracy", "calibrated log-loss"]
    scale = f"{counted.get('num_rows', '?')} held-out rows, {counted.get('num_tokens', '?')} answer tokens."
    gains = "\n".join(
        f"- over {code(name)}: {100 * g['difference']:+.1f} points (95 % interval {100 * g['low']:+.1f} to "
        f"{100 * g['high']:+.1f})"
        for name, g in sorted((evaluation.get("gains") or {}).items())
    )
    paired = f"\n\nGain of the adapter in accuracy, row by row:\n\n{gains}" if gains else ""
    return f"{scale}\n\n{table(head, rows, numbers=True)}{paired}"


def _usage(config: PipelineConfig) -> str:
    if config.decompose.mode == "replace":
        return (
            "`adapter/` is the target layers of this pipeline's model, whose own weights are gone; `rankline serve` "
            "puts the two together. There is no LoRA over the original model that equals it."
        )
    if config.finetune.base == "dense":
        return "`adapter/` loads over the **original** model with stock PEFT, where PEFT has its family."
    hub = config.model.source.startswith("hub:")
    name = base_model(config) if hub else "PATH_OF_THE_ORIGINAL_MODEL"
    revision = f", revision={config.model.revision!r}" if hub and config.model.revision else ""
    split = ", whose initial factors it replaces" if config.finetune.adapter.init == "split" else ""
    return f"""\
- `plain_lora/` loads over the **original** model with stock PEFT. It is the change since initialisation, as a LoRA of
  twice the rank.
- `adapter/` fits the **quantized base of this pipeline** only{split}. `rankline serve` puts the two together.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r}{revision})
model = PeftModel.from_pretrained(model, "plain_lora")
tokenizer = AutoTokenizer.from_pretrained({name!r}{revision})
```"""


def _training(config: PipelineConfig) -> str:
    sections = {
        "decompose": config.decompose,
        "quantize": config.quantize,
        "finetune": config.finetune,
        "data": config.data,
    }
    rows = [
        [code(f"{section}.{name}"), code("null" if value is None else value)]
        for section, values in sections.items()
        for name, value in flat(result_fields(values))
    ]
    return table(["setting", "value"], rows)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        found += flat(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return found


def _lineage(tags: Mapping[str, str]) -> str:
    names = {
        "rankline.base_sha256": "model, sha256",
        "rankline.train_sha256": "training rows, sha256",
        "rankline.heldout_sha256": "held-out rows, sha256",
        "rankline.evaluation_hash": "evaluation",
        "rankline.code_version": "rankline version",
    }
    rows = [[label, code(tags[key])] for key, label in names.items() if key in tags]
    prefix = "rankline.key."
    rows += [[f"key of {key[len(prefix) :]}", code(value)] for key, value in tags.items() if key.startswith(prefix)]
    if "rankline.key" in tags:
        rows.append(["key of this version", code(tags["rankline.key"])])
    return table(["what", "hash"], rows) + "\n\nEqual keys mean equal inputs, settings and format of a stage."


def _limitations(config: PipelineConfig, evaluation: Mapping[str, Any]) -> str:
    plain = "`plain_lora/` over the original model is a different sum of the same change."
    if losses := evaluation.get("plain_lora"):
        change = losses["loss_exported"] - losses["loss_trained"]
        plain += f" On {losses['loss_rows']} held-out rows its loss differs by {change:+.4f} from the adapter's."
    replaced = config.decompose.mode == "replace"
    notes = [
        "The figures are those of the adapter over the quantized base. " + ("" if replaced else plain),
        f"They were taken on {evaluation['adapter'].get('num_rows', 'few')} rows of one data set and say nothing about "
        "other tasks, languages or kinds of text.",
        "The adapter inherits the biases, gaps and licence of its base model and of its training rows.",
        "It was not tested for safety, and should not decide anything about people without a review of its own.",
    ]
    if evaluation["adapter"].get("accuracy") is None:
        notes.insert(1, "The answers are free text: quality was judged by loss alone, never by reading answers.")
    worse = [name for name, g in (evaluation.get("gains") or {}).items() if g["low"] <= 0]
    if worse:
        names = ", ".join(code(name) for name in sorted(worse))
        notes.insert(1, f"The 95 % interval of its gain in accuracy over {names} includes zero or lies below.")
    return "\n".join(f"- {note}" for note in notes)


def verdict(summary: Mapping[str, Any]) -> str:
    """What training did to loss and accuracy, and whether the gain over always answering alike is more than chance."""
    losses, accuracy = summary["losses"], summary["accuracy"]
    text = f"The adapter {_moved('held-out loss', *pair(losses['nf4_init'], losses['adapter']))}"
    before, after, majority = (accuracy.get(name) for name in ("nf4_init", "adapter", "majority"))
    if before is None or after is None:
        return text + "."
    agree = (losses["adapter"] < losses["nf4_init"]) == (after > before)
    text += f" {'and' if agree else 'but'} {_moved('accuracy', percent(before), percent(after), before < after)}"
    text += f" (majority class {percent(majority)})." if majority is not None else "."
    gain = (summary.get("gains") or {}).get("majority")
    if gain is None or gain["low"] > 0:
        return text
    reading = "lies below" if gain["high"] < 0 else "cannot be told apart from"
    low, high = points(gain["low"]), points(gain["high"])
    return f"{text} Its accuracy {reading} that of the majority class (95\u00a0% interval {low} to {high} points)."


def _moved(what: str, before: str, after: str, up: bool) -> str:
    if before == after:
        return f"leaves {what} at {after}"
    return f"{'raises' if up else 'lowers'} {what} from {before} to {after}"


def pair(before: float, after: float) -> tuple[str, str, bool]:
    """Two figures to three digits, or to as many as tell them apart; and whether the second is larger."""
    shown = [(format(before, f".{digits}g"), format(after, f".{digits}g")) for digits in (3, 4, 5, 6)]
    a, b = next((both for both in shown if both[0] != both[1]), shown[0])
    return a, b, before < after


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none."""
    return DASH if value is None else format(value, form)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return DASH if value is None else f"{100 * value:.{digits}f}\u00a0%"


def points(value: float | None) -> str:
    """A difference of shares in points, signed."""
    return DASH if value is None else f"{100 * value:+.1f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")
