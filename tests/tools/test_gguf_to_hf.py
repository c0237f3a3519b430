"""tools/gguf_to_hf.py: the real SmolLM2 against transformers' own GGUF loader, and the zero-padded heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from tools.gguf_to_hf import convert, fetch_gguf, hf_name, pad_heads, unpermute

TEXT = "What is 12 + 7?\n"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return fetch_gguf(None)


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    convert(gguf_file, path, "float32")
    return path


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[1, 4093, 198, 1780, 314, 216, 33, 34]])).logits


def test_names_follow_hugging_faces() -> None:
    assert hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"


def test_unpermute_puts_the_halves_of_a_head_apart() -> None:
    # GGUF keeps (pair 0 first half, pair 0 second half, pair 1 ...); Hugging Face all first halves, then all second.
    rows = torch.tensor([0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0])[:, None]
    assert unpermute(rows, num_heads=2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.slow
def test_weights_equal_those_of_transformers_gguf_loader(gguf_file: Path, converted: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert ours.config.rms_norm_eps == 1e-05
    assert ours.config.tie_word_embeddings
    assert ours.config.rope_parameters["rope_theta"] == 100000.0


@pytest.mark.slow
def test_padded_heads_change_no_logit(gguf_file: Path, converted: Path, tmp_path: Path) -> None:
    convert(gguf_file, tmp_path, "float32", num_heads=12)
    padded = LlamaConfig.from_pretrained(tmp_path)
    assert (padded.num_attention_heads, padded.num_key_value_heads, padded.head_dim) == (12, 4, 64)
    assert torch.equal(logits(converted), logits(tmp_path))


def test_pad_heads_refuses_a_number_that_breaks_the_groups() -> None:
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    with pytest.raises(SystemExit, match="--pad-heads 10 must be a multiple of 3"):
        pad_heads({}, config, 10)


@pytest.mark.slow
def test_tokenizer_splits_digits_and_round_trips(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[2:9] == ["\u0120", "1", "2", "\u0120+", "\u0120", "7", "?"]
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert chat["input_ids"][-4:] == tokenizer("<|im_start|>assistant\n")["input_ids"]
    assert chat["input_ids"].count(tokenizer.eos_token_id) == 2  # of the default system turn and of the user's
