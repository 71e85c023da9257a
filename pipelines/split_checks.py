"""Whether the part that `quantize` splits off is one that the decomposition gives and the adapter can start from."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.config import FinetuneConfig
from lowrank.adapter_options import TAKES_SPLIT
from lowrank.config import AdapterConfig, DecomposeConfig, QuantizeConfig

#: Decompositions whose product `quantize.part: structured` keeps.
STRUCTURED = frozenset().union(*TAKES_SPLIT.values()) - {"low_rank"}
#: Quantization methods that work on any part.
ANY_PART = ("qpissa", "loftq", "lq_lora")


def split_problems(decompose: DecomposeConfig, quantize: QuantizeConfig, tune: FinetuneConfig) -> Iterator[str]:
    """What stands between decompose, quantize and the adapter, one message each."""
    if quantize.part == "structured":
        problems = list(_structured_problems(decompose, quantize))
        yield from problems
        if problems:
            return
    if tune.base == "nf4" and quantize.method != "nf4":
        yield from _family_problems(decompose, quantize, tune.adapter)


def _structured_problems(decompose: DecomposeConfig, quantize: QuantizeConfig) -> Iterator[str]:
    if quantize.method not in ANY_PART:
        yield (
            f"quantize.part: 'structured' is for the methods {', '.join(ANY_PART)}; got {quantize.method!r}. "
            "Set it to 'low_rank', or quantize.method to 'qpissa'."
        )
    if decompose.method not in STRUCTURED:
        yield (
            f"quantize.part: 'structured' keeps the product of {', '.join(sorted(STRUCTURED))}; decompose.method "
            f"{decompose.method!r} gives none. Set it to 'low_rank', or decompose.method to one of them."
        )
    if decompose.mode == "replace":
        yield "quantize.part: decompose.mode 'replace' trains a pair L, R. Set it to 'low_rank', or mode to 'split'."
    if quantize.max_rank is not None:
        yield "quantize.max_rank: a structured part is never cut. Leave it out, or set quantize.part to 'low_rank'."


def _family_problems(decompose: DecomposeConfig, quantize: QuantizeConfig, adapter: AdapterConfig) -> Iterator[str]:
    part = decompose.method if quantize.part == "structured" else "low_rank"
    takes = TAKES_SPLIT.get(adapter.method, frozenset())
    if part in takes:
        yield from _product_problems(decompose, adapter, part)
    elif part == "low_rank":
        yield (
            f"finetune.adapter.method: {adapter.method!r} cannot hold the L and R that quantize.method "
            f"{quantize.method!r} takes out of W. Set quantize.method to 'nf4'{_own_form(takes)}."
        )
    else:
        able = ", ".join(sorted(name for name, forms in TAKES_SPLIT.items() if part in forms))
        yield (
            f"finetune.adapter.method: {adapter.method!r} cannot start from the {part} product that quantize.part "
            f"'structured' takes out of W. Set it to one of {able}{_own_form(takes - {'low_rank'})}."
        )


def _own_form(takes: frozenset[str]) -> str:
    names = " or ".join(map(repr, sorted(takes)))
    return f", or decompose.method to {names} and quantize.part to 'structured'" if takes else ""


def _product_problems(decompose: DecomposeConfig, adapter: AdapterConfig, part: str) -> Iterator[str]:
    """What the family that has this form cannot hold of it."""
    options = decompose.options
    factors = len(options.get("shape") or (0, 0))
    if part == "kronecker":
        if decompose.rank != 1:
            yield f"decompose.rank: {adapter.method} holds one Kronecker product. Set it to 1."
        if options.get("padding", "error") != "error":
            yield f"decompose.options.padding: {adapter.method} has no rows to trim. Set it to 'error'."
        if adapter.options.get("decompose_both"):
            yield "finetune.adapter.options.decompose_both: it would cut the W1 of the split. Set it to false."
        inner, r = options.get("inner_rank"), adapter.r
        if inner and r and r < inner:
            yield (
                f"finetune.adapter.r: {r} is smaller than decompose.options.inner_rank = {inner}, which the residual "
                f"is quantized against. Set finetune.adapter.r >= {inner} or null."
            )
    if adapter.method == "lokh":
        form = "low-rank" if part == "khatri_rao_low_rank" else "chain"
        if adapter.options.get("form", "low-rank") != form:
            yield f"finetune.adapter.options.form: decompose.method {part!r} gives the form {form!r}. Set it to that."
    if factors != 2 and (part == "khatri_rao_low_rank" or adapter.method == "kradapter"):
        yield f"decompose.options.shape: {adapter.method} takes two factors here, got {factors}. Set two sizes."
