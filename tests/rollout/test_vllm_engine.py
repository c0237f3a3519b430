"""vLLM in training ranks, against transformers: two replicas of one rank, and one replica of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from megalign.batch import Completion
from tests.ranks import run_ranks
from tests.rollout.vllm_ranks import KV_CACHE_BYTES, PROMPTS, observe, weights_of

pytestmark = pytest.mark.vllm
VOCAB = 259  # vLLM pads to 320, and at TP2 to another number


def make_model(family: str, path: Path) -> str:
    """A tiny random model with a word-level tokenizer of single characters."""
    from tokenizers import Tokenizer, models
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    # Shorter than the model's vocabulary, as real ones often are.
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): 3 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(path)
    return str(path)


# Two replicas with tied embeddings, one replica of two ranks without: each on fresh processes, once.
@pytest.fixture(scope="module", params=[("qwen2", 1), ("llama", 2)], ids=["qwen2-2xTP1", "llama-TP2"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    family, vllm_tp = request.param
    path = make_model(family, tmp_path_factory.mktemp(family))
    ranks = run_ranks(2, observe, path, vllm_tp, timeout=240, fresh=True)
    return {"path": path, "tp": vllm_tp, "ranks": ranks}


def everyone(seen: dict[str, Any], name: str) -> list[Completion]:
    """The completions of all replicas."""
    parts = [rank[name] for rank in seen["ranks"][:: seen["tp"]]]
    return [completion for part in parts for completion in part]


def test_the_trainers_torch_is_untouched(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert rank["state_kept"]
        assert rank["state_kept_by_generate"]


def test_replicas_take_contiguous_shares_and_their_ranks_agree(seen: dict[str, Any]) -> None:
    assert [rank["num_replicas"] for rank in seen["ranks"]] == [2 // seen["tp"]] * 2
    completions = everyone(seen, "second")
    assert [completion.index for completion in completions] == list(range(7))
    assert [completion.prompt_ids for completion in completions] == PROMPTS
    assert {completion.policy_version for completion in completions} == {3}
    if seen["tp"] == 2:
        assert seen["ranks"][0]["second"] == seen["ranks"][1]["second"]


def test_every_rank_gets_all_completions(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert rank["everyone"] == everyone(seen, "second")
        # One prompt for two replicas: the other has nothing to generate, and nothing hangs.
        assert [completion.index for completion in rank["two_prompts"]] == [0]


@pytest.mark.parametrize(
    ("name", "weights", "processor"),
    [
        ("first", 1, TemperatureLogitsWarper(0.7)),
        ("second", 2, None),
        ("top_p", 2, TopPLogitsWarper(0.5)),
        ("min_p", 2, MinPLogitsWarper(0.3)),
        ("penalty", 2, RepetitionPenaltyLogitsProcessor(1.5)),
    ],
)
def test_logprobs_are_those_of_transformers(
    seen: dict[str, Any], name: str, weights: int, processor: LogitsProcessor | None
) -> None:
    completions = everyone(seen, name)
    assert logprob_difference(seen["path"], weights, processor, completions) < 1e-4
    # Another policy must fail this: the weights really arrive, the tied head's too.
    assert logprob_difference(seen["path"], 3 - weights, processor, completions) > 0.1


def logprob_difference(
    path: str, weights: int, processor: LogitsProcessor | None, completions: list[Completion]
) -> float:
    """Mean |vLLM - transformers| over the sampled tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.load_state_dict(weights_of(path, weights), strict=False)
    model.tie_weights()
    differences = []
    for completion in completions:
        tokens = torch.tensor(completion.prompt_ids + completion.completion_ids)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        start = len(completion.prompt_ids)
        for position, logprob in enumerate(completion.logprobs, start=start):
            scores = logits[position - 1 : position]
            if processor is not None:
                scores = processor(tokens[None, :position], scores)
            differences.append(abs(scores.log_softmax(-1)[0, tokens[position]].item() - logprob))
    return sum(differences) / len(differences)


def test_seeds_repeat_a_sample(seen: dict[str, Any]) -> None:
    assert everyone(seen, "again") == everyone(seen, "first")
    assert len({tuple(completion.completion_ids) for completion in everyone(seen, "first")}) == 7


def test_no_padded_token_is_sampled(seen: dict[str, Any]) -> None:
    for name in ("first", "second", "penalty", "min_p"):
        assert max(max(completion.completion_ids) for completion in everyone(seen, name)) < VOCAB


def test_a_completion_ends_with_its_stop_token(seen: dict[str, Any]) -> None:
    eos = seen["ranks"][0]["eos"]
    first = everyone(seen, "stopped")[0]
    assert first.finish_reason == "stop"
    assert first.completion_ids[-1] == eos and eos not in first.completion_ids[:-1]
    assert len(first.logprobs) == len(first.completion_ids)
    for completion in everyone(seen, "second"):
        by_eos = completion.completion_ids[-1] == 2  # the tokenizer's, which this engine knows
        assert completion.finish_reason == ("stop" if by_eos else "length")
        assert by_eos or len(completion.completion_ids) == 12


def test_the_models_end_token_ends_a_completion_unless_it_is_to_be_ignored(seen: dict[str, Any]) -> None:
    for completion in everyone(seen, "at_eos"):
        assert (completion.completion_ids, completion.finish_reason) == ([2], "stop")
    for completion in everyone(seen, "past_eos"):
        assert (completion.completion_ids, completion.finish_reason) == ([2] * 12, "length")


def test_sampling_options_reach_vllm(seen: dict[str, Any]) -> None:
    assert all(value == 0.0 for completion in everyone(seen, "greedy_by_top_k") for value in completion.logprobs)
    plain = everyone(seen, "second")
    for name in ("top_p", "min_p", "penalty"):
        assert everyone(seen, name) != plain
    assert {token for completion in everyone(seen, "extra") for token in completion.completion_ids} <= {7, 8}
    a, b, c = 3, 4, 5
    for completion in everyone(seen, "regex"):
        tokens = completion.completion_ids
        assert set(tokens[:-1]) <= {a, b, c, 2} and tokens[0] in (a, b)


def test_user_errors_name_the_value(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert rank["unknown_extra"].startswith("UserError: generation_kwargs['presence_penality']")
        assert "presence_penalty" in rank["unknown_extra"]
        assert rank["owned_extra"].startswith("UserError: generation_kwargs['temperature']")
        assert rank["bad_value"].startswith("UserError:") and "9.0" in rank["bad_value"]
        assert "prompt 0 has 128 tokens" in rank["too_long"]
        assert all("\n" not in rank[name] for name in ("unknown_extra", "owned_extra", "bad_value", "too_long"))


def test_nothing_is_sampled_from_weights_that_did_not_come(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert "holds no policy yet" in rank["before_weights"]
        assert "were not in the stream" in rank["missing"]
        assert rank["asleep"].startswith("AssertionError")
        assert "kv_cache" in rank["half_asleep"]


def test_sleep_gives_memory_back_and_waking_gives_the_same_answers(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        weights = 2 * 3 * 128 * 8192 * 4 / seen["tp"]  # the layers' MLPs; attention and vocabulary are small
        assert rank["resident_awake"] - rank["resident_asleep"] > 0.95 * (KV_CACHE_BYTES + weights)
        assert rank["asleep_again"] == ["kv_cache", "weights"]
        assert not rank["shared_memory"]
    assert everyone(seen, "after_sleep") == everyone(seen, "second")
