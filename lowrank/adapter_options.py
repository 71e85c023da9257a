"""Options of every adapter family, one frozen dataclass each, importable without torch.

They are what `finetune.adapter.options` of a pipeline holds; all are part of the result. `ADAPTER_OPTIONS` maps a
family's name to its class.
"""

from typing import Any

from lowrank.options import NoOptions

#: Options of every family by its name in `lowrank.adapters.registry.FAMILIES`.
ADAPTER_OPTIONS: dict[str, type[Any]] = {
    "lora": NoOptions,
    "dora": NoOptions,
}


def options_of(method: str, given: dict[str, Any]) -> Any:
    """The options of a family with `given` filled in.

    Raises:
        TypeError: an option that the family does not have.
        ValueError: a value out of range.
    """
    return ADAPTER_OPTIONS[method](**given)
