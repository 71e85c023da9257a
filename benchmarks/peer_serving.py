"""Decode by a serving peer, in an environment of its own: one JSON request per line in, one answer per line out.

The first request says what to load: `library`, `model` (a directory), `adapters` (id -> PEFT directory) and `rank`; its
answer holds the version. The others hold `prompts` (token ids, all of one length), `names` (an adapter id or null for
each) and `new`, the number of new tokens; the answer holds the token ids. Greedy, and nothing ends an answer early.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

Tokens = list[list[int]]
Decode = Callable[[Tokens, list[str | None], int], Tokens]


def main() -> None:
    """Load, then answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    first = json.loads(sys.stdin.readline())
    decode = {"vllm": vllm, "polylora": polylora}[first["library"]](first)
    package = {"vllm": "vllm-cpu"}.get(first["library"], first["library"])
    print(json.dumps({"version": metadata.version(package)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        found = decode(request["prompts"], request["names"], request["new"])
        print(json.dumps({"tokens": found}), file=answers, flush=True)


def vllm(options: dict[str, Any]) -> Decode:
    """vLLM's CPU backend, LoRA enabled where there are adapters."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    loras = {name: LoRARequest(name, k, path) for k, (name, path) in enumerate(options["adapters"].items(), start=1)}
    more = {"enable_lora": True, "max_loras": len(loras), "max_lora_rank": options["rank"]} if loras else {}
    model = LLM(model=options["model"], dtype="float32", max_model_len=512, max_num_seqs=32, **more)

    def decode(prompts: Tokens, names: list[str | None], new: int) -> Tokens:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        with_loras = [None if name is None else loras[name] for name in names] if loras else None
        found = model.generate(asked, sampling, lora_request=with_loras, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return decode


def polylora(options: dict[str, Any]) -> Decode:
    """PolyLoRA's layers in transformers' model; the loop over tokens is ours, as it brings none."""
    import torch
    from polylora import PolyLoraConfig, PolyLoraModel
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(THREADS)
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = PolyLoraConfig(
        max_gpu_adapters=len(options["adapters"]) + 1, max_rank=options["rank"], target_modules=targets
    )
    model = PolyLoraModel(base, config).eval()
    for name, path in options["adapters"].items():
        model.load_adapter_from_disk(name, path)

    @torch.inference_mode()
    def decode(prompts: Tokens, names: list[str | None], new: int) -> Tokens:
        ids, cache, made = torch.tensor(prompts), DynamicCache(), []
        own = ["__base__" if name is None else name for name in names]
        for _ in range(new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_ids=own)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
        return torch.cat(made, dim=1).tolist()

    return decode


if __name__ == "__main__":
    main()
