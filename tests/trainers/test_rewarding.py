"""Reward models beside reward functions, and the penalty of overlong completions."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megalign.batch import Completion
from megalign.config import GRPOConfig
from megalign.errors import UserError
from megalign.trainers.rewarding import Rewarding, weighted_rewards
from tests.layouts import ONE_RANK, Layout, groups_of
from tests.ranks import run_ranks
from tests.tiny import save_tiny_classifier
from tests.trainers.grpo_runs import grpo_fields, prompt_rows, save_model_with_tokenizer, train_grpo
from tests.trainers.runs import metric_lines

# No word begins like t0, t1 or t2: the tokenizer cuts its special tokens out.
PROMPTS = ["t5 t6 ", "t7 ", "t8 t9 t80 ", "t51 ", "t52 t53 "]
TEXTS = ["t30 t31", "t32", "t33 t34 t35 t36", "t37 t38", "t39"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_tokenizer_and_a_weight_for_each_of_the_users_rewards(count: int) -> None:
    given = {**grpo_fields(output_dir="unused"), "max_completion_length": 6, "overlong_buffer_length": 2}
    args, groups = GRPOConfig(**given), groups_of(ONE_RANK)
    message = f"reward_processing_classes has {count} entries for 2 reward functions; give one for each"
    with pytest.raises(UserError, match=message):
        weighted_rewards([constant, lengths], args, groups, [None] * count)
    args.reward_weights = [1.0] * count
    with pytest.raises(UserError, match=f"reward_weights has {count} values for 2 reward functions; give one each"):
        weighted_rewards([constant, lengths], args, groups)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("judge")
    save_model_with_tokenizer(path)
    for file in path.glob("model*"):
        file.unlink()
    return save_tiny_classifier("llama", path, seed=3, head_dim=32)


def constant(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.25] * len(completions)


def lengths(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def scored(judge: str, layout: Layout, chosen: list[Any], texts: list[str] = TEXTS) -> tuple[list[str], torch.Tensor]:
    args = GRPOConfig(
        **grpo_fields(
            output_dir="unused",
            per_device_train_batch_size=2,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
        )
    )
    rewarding = Rewarding(chosen, args, groups_of(layout))
    rewarding.load()
    completions = [
        Completion(index=i, prompt_ids=[1], completion_ids=[2], logprobs=[-1.0], finish_reason="stop", policy_version=0)
        for i in range(len(texts))
    ]
    result = rewarding(completions, PROMPTS, texts, group_size=1)
    return rewarding.names, result.rewards


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, pp=2), Layout(dp=2)], ids=str)
def test_a_reward_model_scores_as_transformers_does_beside_functions(judge: str, layout: Layout) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(judge, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    wanted = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        ids = tokenizer(prompt + text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        wanted.append(float(model(ids).logits[0, 0]))
    for names, rewards in run_ranks(layout.world, scored, judge, layout, [constant, judge, lengths]):
        assert names == ["constant", Path(judge).name, "lengths"]
        assert torch.allclose(rewards[:, 1], torch.tensor(wanted), atol=1e-4)
        assert rewards[:, 0].tolist() == [0.25] * 5
        assert rewards[:, 2].tolist() == [2, 1, 4, 2, 1]


@pytest.mark.parametrize("pad", ["t0", None])
def test_pads_at_the_end_are_not_scored_as_in_transformers(judge: str, tmp_path: Path, pad: str | None) -> None:
    path = Path(shutil.copytree(judge, tmp_path / "judge"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(path)
    skipped = tokenizer.eos_token if pad is None else pad
    texts = [f"t30 t31 {skipped}", f"t32 {skipped} t33", f"t34 {skipped} {skipped}", "t35", "t36 t0 t1 t2"]
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(skipped)  # as TRL's GRPOTrainer does
    wanted = []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt + text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        wanted.append(float(model(ids).logits[0, 0]))
    ((_, rewards),) = run_ranks(1, scored, str(path), ONE_RANK, [str(path)], texts)
    assert torch.allclose(rewards[:, 0], torch.tensor(wanted), atol=1e-4)


def scored_to_their_ends(judge: str) -> list[float]:
    groups, tokenizer = groups_of(ONE_RANK), AutoTokenizer.from_pretrained(judge)
    rewarding = Rewarding([judge], GRPOConfig(**grpo_fields(output_dir="unused")), groups, end_tokens_of=tokenizer)
    rewarding.load()
    completions = [
        Completion(
            index=i,
            prompt_ids=[5, 6],
            completion_ids=ids,
            logprobs=[-1.0] * len(ids),
            finish_reason=finish,
            policy_version=0,
        )
        for i, (ids, finish) in enumerate(ENDED)
    ]
    texts = tokenizer.batch_decode([ids for ids, _ in ENDED], skip_special_tokens=True)
    return rewarding(completions, ["t5 t6 "] * len(ENDED), texts, group_size=1).rewards[:, 0].tolist()


# By its end token, cut off, by a stop token that is text, cut off at an end token of no effect (ignore_eos).
ENDED = [([40, 50, 60, 2], "stop"), ([40, 50, 60], "length"), ([40, 50], "stop"), ([40, 2], "length")]


def test_ppos_reward_model_reads_the_end_token_as_in_trl(judge: str) -> None:
    from trl.experimental.utils import get_reward

    model = AutoModelForSequenceClassification.from_pretrained(judge, attn_implementation="eager").eval()
    wanted = []
    for ids, _ in [*ENDED[:3], ([40], "")]:
        query_response = torch.tensor([[5, 6, *ids, 0]])  # of pads TRL has one at least
        wanted.append(get_reward(model, query_response, 0, 2)[1].item())
    (found,) = run_ranks(1, scored_to_their_ends, judge)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-2


def test_rewards_of_one_name_are_told_apart(judge: str, tmp_path: Path) -> None:
    for place in "ab":
        shutil.copytree(judge, tmp_path / place / "judge")
    models = [str(tmp_path / place / "judge") for place in "ab"]
    chosen = [lengths, models[0], functools.partial(lengths, unused=1), models[1], constant, lengths]
    ((names, rewards),) = run_ranks(1, scored, judge, ONE_RANK, chosen)
    assert names == ["lengths", "judge", "lengths_2", "judge_2", "constant", "lengths_3"]
    assert rewards[:, 4].tolist() == [0.25] * 5 and rewards[:, 5].tolist() == [2, 1, 4, 2, 1]


def test_a_reward_model_alone_is_enough(judge: str) -> None:
    ((names, rewards),) = run_ranks(1, scored, judge, ONE_RANK, [judge])
    assert names == [Path(judge).name] and rewards.shape == (5, 1)


def test_a_run_learns_from_a_reward_model_by_its_weight(judge: str, tmp_path: Path) -> None:
    model = save_model_with_tokenizer(tmp_path / "model")
    fields = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "reward_weights": [2.0, 1.0]}
    given = {"reward_funcs": [judge, "length_reward"]}
    run_ranks(1, train_grpo, model, prompt_rows(8), fields, given)
    (line, *_) = metric_lines(tmp_path / "out")
    name = Path(judge).name
    expected = 2 * line[f"rewards/{name}/mean"] + line["rewards/length_reward/mean"]
    assert line["reward"] == pytest.approx(expected, abs=1e-5)
    assert line[f"rewards/{name}/std"] > 0


def test_overlong_completions_are_penalized(tmp_path: Path) -> None:
    model = save_model_with_tokenizer(tmp_path / "model")
    fields = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "max_completion_length": 6}
    run_ranks(1, train_grpo, model, prompt_rows(8), {**fields, "overlong_buffer_length": 6, "overlong_penalty": 3.0},
              {"reward_funcs": [constant]})  # fmt: skip
    (line, *_) = metric_lines(tmp_path / "out")
    # With a buffer as long as the limit the penalty is (0 - length) / 6 of each completion: linear, so of the mean.
    penalty = line["rewards/soft_overlong_punishment_reward/mean"]
    assert penalty == pytest.approx(-line["completions/mean_length"] / 6)
    assert line["reward"] == pytest.approx(0.25 + 3.0 * penalty)


def refused(path: str) -> str:
    try:
        scored(path, ONE_RANK, [path])
    except UserError as error:
        return str(error)
    return ""


def test_what_is_no_reward_model_is_refused_by_name(judge: str, tmp_path: Path) -> None:
    bare = save_tiny_classifier("llama", tmp_path / "bare", head_dim=32)
    assert "has no tokenizer" in run_ranks(1, refused, bare)[0]
    two = save_model_with_tokenizer(tmp_path / "two")
    for file in Path(two).glob("model*"):
        file.unlink()
    save_tiny_classifier("llama", Path(two), num_labels=2, head_dim=32)
    assert "2 labels" in run_ranks(1, refused, two)[0]
    policy = save_model_with_tokenizer(tmp_path / "policy")
    assert "policy has no score head" in run_ranks(1, refused, policy)[0]


def read_by_judge(judge: str, fields: dict[str, Any]) -> str:
    prompt = [{"role": "user", "content": "hi"}]
    args = GRPOConfig(**grpo_fields(output_dir="unused", **fields))
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.chat_template = "{% if thinks %}t7 {% endif %}{{ messages[0].content }} {{ messages[1].content }}"
    model = Rewarding([judge], args, groups_of(ONE_RANK), [tokenizer]).models[0]
    model.load()
    return tokenizer.decode(model._sequence(prompt, "t5", None)["tokens"])


def test_the_templates_options_reach_a_reward_model(judge: str) -> None:
    without, thinking = (
        run_ranks(1, read_by_judge, judge, fields)[0] for fields in ({}, {"chat_template_kwargs": {"thinks": True}})
    )
    assert thinking.startswith("t7") and not without.startswith("t7")
