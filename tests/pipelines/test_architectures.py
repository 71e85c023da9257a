"""Models in and out: every architecture and file layout becomes shards that give the original's logits back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import make_data, make_model_dir, run_serially, tiny_pipeline
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from cluster.artifacts import ShardSet, SplitSet
from cluster.model import ModelSource, build_adapted, build_dense
from lowrank.errors import CheckpointError
from pipelines.config import PipelineConfig
from pipelines.sources import ModelFiles
from pipelines.stages.shard import Rows, plan_shards

ARCHITECTURES = ["llama", "qwen2", "mistral", "gpt2"]

pytestmark = pytest.mark.filterwarnings("ignore")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 68).reshape(4, 16), use_cache=False).logits


def original_of(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


def pipeline_of(root: Path, path: Path, **sections: Any) -> PipelineConfig:
    source = {"source": str(path)} | sections.pop("model", {})
    return tiny_pipeline(root, None, model=source, data=make_data(root, 4, 2), **sections)


def shards_of(root: Path, path: Path, **sections: Any) -> ShardSet:
    return ShardSet(run_serially(pipeline_of(root, path, **sections), "shard")["shard"])


def assert_same_model(shards: ShardSet, model: Path) -> None:
    ours, theirs = logits_of(build_dense(shards, torch.float32)), logits_of(original_of(model))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shards_give_the_logits_of_the_original(tmp_path: Path, arch: str) -> None:
    model = make_model_dir(tmp_path, arch)
    shards = shards_of(tmp_path, model)
    assert_same_model(shards, model)
    pieces = [len(tensor.pieces) for tensor in shards.tensors.values()]
    assert len(pieces) == len(shards.architecture.parameters)
    embedding = {"qwen2": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}.get(arch)
    assert shards.architecture.aliases == ({"lm_head.weight": embedding} if embedding else {})


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_one_tensor_over_many_files_is_whole_again(tmp_path: Path, arch: str) -> None:
    model = make_model_dir(tmp_path, arch)
    shards = shards_of(tmp_path, model, shard={"shard_bytes": 1024})
    assert max(len(tensor.pieces) for tensor in shards.tensors.values()) >= 6
    for name, tensor in shards.tensors.items():
        whole = shards.load(name)
        assert whole.shape == tensor.shape
        assert tensor.pieces[0].row_start == 0
        assert tensor.pieces[-1].row_stop == tensor.shape[0]
    for file in shards.path.glob("units/shard-*/shard.safetensors"):
        assert sum(t.numel() * t.element_size() for t in load_file(file).values()) <= 1024
    assert_same_model(shards, model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_quantized_residual_with_its_factors_is_the_initial_model(tmp_path: Path, arch: str) -> None:
    """Logits of nf4_init = those of the original with every target replaced by Q + L·R."""
    config = pipeline_of(tmp_path, make_model_dir(tmp_path, arch), decompose={"target_modules": "all-linear"})
    paths = run_serially(config, "shard", "decompose", "quantize")
    shards, splits = ShardSet(paths["shard"]), SplitSet(paths["quantize"])
    assert set(splits.modules) == {spec.name for spec in shards.architecture.linears}
    replaced = original_of(Path(config.model.source))
    for spec in shards.architecture.linears:
        split = splits.load(spec.name)
        whole = split.residual.dequantize().float()
        if split.part is not None:
            whole += split.part.left.float() @ split.part.right.float()
        replaced.get_submodule(spec.name).weight.data = whole.T if spec.transposed else whole
    source = ModelSource(paths["shard"], paths["quantize"], config.finetune.adapter)
    initial = logits_of(build_adapted(source, torch.float32, {"init": None}))
    torch.testing.assert_close(initial, logits_of(replaced), atol=2e-4, rtol=1e-4)
    assert (initial - logits_of(original_of(Path(config.model.source)))).abs().max() > 1e-3


def test_bfloat16_keeps_its_bytes(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path, "llama", dtype=torch.bfloat16)
    shards = shards_of(tmp_path, model)
    assert {tensor.dtype for tensor in shards.tensors.values()} == {"BF16"}
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(shards.load(name), tensor)
    assert_same_model(shards, model)


def test_a_checkpoint_of_many_files_with_an_index(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path, "mistral", max_shard_size="8KB")
    assert len(list(model.glob("model-*.safetensors"))) >= 3
    assert_same_model(shards_of(tmp_path, model), model)
    next(model.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"parts \['model-.*'\] are missing \(1 of \d\)"):
        shards_of(tmp_path, model)


def test_keys_without_the_base_prefix_and_stale_masks(tmp_path: Path) -> None:
    """As the hub's gpt2 has them."""
    model = make_model_dir(tmp_path, "gpt2")
    stored = load_file(model / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items() if name != "lm_head.weight"}
    assert "wte.weight" in bare
    bare["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    expected = logits_of(original_of(model))
    save_file(bare, model / "model.safetensors", metadata={"format": "pt"})
    shards = shards_of(tmp_path, model)
    assert torch.equal(logits_of(build_dense(shards, torch.float32)), expected)


def gguf_config() -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 104}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**sizes, **heads, **ids, rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False)


def write_gguf(path: Path, model: Any, quantize: bool) -> dict[str, torch.Tensor]:
    """Write a Llama as llama.cpp's converter does; the tensors that a reader should find, by Hugging Face name."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    expected = {}
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        kind = gguf.GGMLQuantizationType.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # LlamaModel.permute of convert_hf_to_gguf.py
            data = (
                data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
            )
        if quantize and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            tensor = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
            data = gguf.quants.quantize(np.ascontiguousarray(data), kind)
        expected[name] = tensor
        stem = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stem, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("quantize", [False, True], ids=["F32", "Q8_0"])
def test_gguf_gives_names_rows_and_config_of_the_original(tmp_path: Path, quantize: bool) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(gguf_config(), dtype=torch.float32, attn_implementation="sdpa").eval()
    expected = write_gguf(tmp_path / "m.gguf", model, quantize)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    shards = shards_of(tmp_path, tmp_path / "m.gguf", model={"tokenizer": str(tokenizer)})
    assert set(shards.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(shards.load(name), tensor), name
    config = json.loads((shards.meta_dir / "config.json").read_text())
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert config[key] == getattr(model.config, key), key
    for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        assert config[key] == getattr(model.config, key), key
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    model.load_state_dict(expected)
    torch.testing.assert_close(logits_of(build_dense(shards, torch.float32)), logits_of(model), atol=1e-6, rtol=0)
    assert (shards.meta_dir / "tokenizer.json").is_file()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 64)), min_size=1, max_size=12),
    st.integers(16, 400),
)
def test_the_plan_covers_every_row_once_and_fills_evenly(shapes: list[tuple[int, int]], shard_bytes: int) -> None:
    tensors = [Rows(f"t{i}", f"t{i}", (m, n), "U8", 1, False, 0, m) for i, (m, n) in enumerate(shapes)]
    plan = plan_shards(tensors, shard_bytes)
    covered = {rows.tensor: 0 for rows in tensors}
    for rows in (rows for shard in plan for rows in shard):
        assert rows.start == covered[rows.tensor] < rows.stop
        covered[rows.tensor] = rows.stop
    assert covered == {rows.tensor: rows.shape[0] for rows in tensors}
    sizes = [sum((rows.stop - rows.start) * rows.shape[1] for rows in shard) for shard in plan]
    for shard, size in zip(plan, sizes):
        assert size <= shard_bytes or (len(shard) == 1 and shard[0].stop - shard[0].start == 1)
    widest = max(n for _, n in shapes)
    capacity = -(-sum(sizes) // max(1, -(-sum(sizes) // shard_bytes)))
    assert all(size > capacity - widest for size in sizes[:-1])


_ONE_SHARD = """
import re, sys, threading, time
from pathlib import Path
import torch, safetensors.torch
from cluster.durable import peak_rss_bytes
from pipelines.sources import ModelFiles
from pipelines.stages.shard import Rows, ShardJob, write_shard_unit
model, root, rows, columns, transposed = sys.argv[1:]
shape = (int(rows), int(columns))

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

before = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
job = Rows("w", "w", shape, "F32", 4, transposed == "True", 0, shape[0])
write_shard_unit(ShardJob(Path(root), "shard-00000", ModelFiles("safetensors", Path(model), None), (job,)))
print(peak - before, peak_rss_bytes())
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_a_shard_is_streamed(tmp_path: Path, transposed: bool) -> None:
    """The whole process stays below 2 x the largest tensor + 500 MB, and the work itself far below one tensor."""
    rows, columns = 50_000, 1_000
    stored = torch.arange(rows * columns, dtype=torch.float32).reshape(
        (columns, rows) if transposed else (rows, columns)
    )
    save_file({"w": stored}, tmp_path / "model.safetensors")
    arguments = [str(tmp_path), str(tmp_path / "out"), str(rows), str(columns), str(transposed)]
    done = subprocess.run([sys.executable, "-c", _ONE_SHARD, *arguments], check=True, capture_output=True, text=True)
    own, peak = map(int, done.stdout.split())
    assert peak <= 2 * stored.nbytes + 500e6  # mapped pages of the file among it
    assert own <= 0.75 * stored.nbytes
    written = load_file(tmp_path / "out" / "units" / "shard-00000" / "shard.safetensors")["w@0"]
    assert torch.equal(written, stored.T if transposed else stored)
    assert ModelFiles("safetensors", tmp_path, None).checkpoint().files()
