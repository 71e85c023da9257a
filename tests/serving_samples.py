"""A tiny Llama, its tokenizer and LoRA adapters, in memory and as the pipeline leaves them on disk."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.artifacts import SplitSet
from cluster.model import ModelSource
from lowrank.adapters.lora import LoRA
from lowrank.adapters.peft_format import save_adapter
from lowrank.config import AdapterConfig

EOS = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"
)


def make_tokenizer() -> Any:
    """One token per byte, so that every character beyond ASCII spans several; 256 ends an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)


def make_model() -> Any:
    """Random, with logits far enough apart that greedy answers do not hang on rounding; it talks until its limit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=EOS, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0  # a random model must not end its answers by chance
    return model


def make_adapter(shapes: Mapping[str, Any], seed: int) -> dict[str, LoRA]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (m, n) in shapes.items():
        a, b = torch.randn(4, n, generator=generator) * 0.3, torch.randn(m, 4, generator=generator) * 0.3
        made[name] = LoRA(a, b, 1.0)
    return made


def make_served(root: Path) -> ModelSource:
    """An NF4 model as `quantize` leaves it."""
    import tiny

    source = tiny.make_tiny(root, base="nf4", seed=3)
    tiny.make_tokenizer(source.shards / "units" / "meta", TEMPLATE)
    # an id that is never produced: the tiny model must not end its answers by chance
    (source.shards / "units" / "meta" / "generation_config.json").write_text('{"eos_token_id": 3}')
    return source


def write_served_adapter(source: ModelSource, directory: Path, seed: int) -> Path:
    """A random adapter for `make_served`'s model, in PEFT's format."""
    shapes = {module: split.residual.shape for module, split in SplitSet(source.splits).items() if split.residual}
    save_adapter(directory, make_adapter(shapes, seed), AdapterConfig(r=4, lora_alpha=4.0), {})
    return directory


def free_port() -> int:
    """Of this machine, now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
