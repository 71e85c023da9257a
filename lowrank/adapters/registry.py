"""The adapter families by the name that `finetune.adapter.method` takes; a new family is one file and one line here."""

from __future__ import annotations

from lowrank.adapters.lora import LoRA

FAMILIES: dict[str, type[LoRA]] = {"lora": LoRA}
