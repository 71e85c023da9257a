"""The tables of `rankline plan --model-config`."""

from __future__ import annotations

from typing import Any

from pipelines.progress import hms
from pipelines.show import new_table, print_all, size

_PARTS = {
    "weights": "frozen weights",
    "adapter": "adapter parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "workspace": "workspace",
    "training": "while training",
    "load": "while loading",
    "host": "offloaded to the host",
}


def show(result: dict[str, Any]) -> None:
    """Stages, a rank's memory, whether it fits, and what all of it rests on."""
    gpus = f" x {result['gpus_per_node']} GPUs" if result["gpus_per_node"] else ""
    title = f"{result['num_parameters'] / 1e9:.2f} B parameters on {result['nodes']} nodes{gpus}"
    stages = new_table(title, "stage", "units", "read", "written", "network", "FLOP", "time ~", "bound")
    for one in result["stages"]:
        figures = (_short(one["read_bytes"]), _short(one["written_bytes"]), _short(one["network_bytes"]))
        flops = f"{one['flops']:.0e}".replace("+", "") if one["flops"] else ""
        stages.add_row(one["name"], str(one["units"]), *figures, flops, hms(one["seconds"]), one["bound"])
    memory = result["memory"]
    head = f"one of {result['ranks']} ranks, ZeRO-{result['zero_stage']}, {result['dtype']}"
    parts = new_table(head, "memory", "bytes ~")
    for name, label in _PARTS.items():
        if memory[name] or name != "host":
            parts.add_row(label, size(memory[name]))
    print_all(stages, f"about {hms(result['seconds'])} in all, beginning included", "", parts)
    print_all(_verdict(memory))
    for line in result["advice"]:
        print_all(f"note: {line}")
    assumed = result["assumed"]
    print_all(
        "",
        f"assumed: {assumed['training_rows']} training rows and {assumed['heldout_rows']} held-out rows of "
        f"{assumed['tokens_per_row']:g} tokens, {assumed['optimizer_steps']} steps, micro-batches of "
        f"{assumed['micro_batch_size']} rows; {'; '.join(assumed['notes'])}. All figures: --json.",
    )


def _short(count: float) -> str:
    """Bytes in a narrow column."""
    for unit in ("B", "K", "M", "G"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} T"


def _verdict(memory: dict[str, Any]) -> str:
    if memory["fits"] is None:
        return f"peak {size(memory['peak'])} per rank, of the node's own memory"
    room = size(memory["room"])
    if memory["fits"]:
        return f"fits: peak {size(memory['peak'])} of {room}"
    return f"does not fit: peak {size(memory['peak'])} of {room}. What would: {'; or '.join(memory['remedies'])}."
