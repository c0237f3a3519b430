"""Bad rows, completions and rewards in every trainer: handled, or refused in one sentence; never a NaN in a weight.

What single rows, reward functions and losses say and compute is tested where they are made (tests/data, tests/rollout,
tests/algos); here are whole runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import megalign
from megalign.batch import Completion
from megalign.config import DPOConfig, GRPOConfig
from megalign.errors import UserError
from tests.ranks import run_ranks
from tests.trainers.grpo_runs import closeness, prompt_rows, save_model_with_tokenizer
from tests.trainers.layout_runs import OFFLINE, ONLINE, made

END = 2  # t2, the tokenizer's end token
# No word begins like t1 or t2 but these: the tokenizer cuts its special tokens out.
PAIRS = [
    ("t5 t6 ", "t7 t8 ", "t9 "),
    ("t30 ", "t31 ", "t32 t33 t34 "),
    ("t35 t36 ", "t37 ", "t38 "),
    ("t39 ", "t3 ", "t4 "),
]
LONG = " ".join(f"t{30 + place % 70}" for place in range(300)) + " "  # the model has 128 positions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


def choices(config: type, field: str) -> tuple[str, ...]:
    (found,) = [one.metadata["choices"] for one in dataclasses.fields(config) if one.name == field]
    return found


def trained(kind: str, model: str, fields: dict[str, Any], given: dict[str, Any], change: Any = None) -> dict[str, Any]:
    """Two steps on the calling rank; `change` is done to every completion that is sampled."""
    config = {
        "bf16": False,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4 if kind in OFFLINE else 8,
        "learning_rate": 1e-2,
        **({"max_completion_length": 6} if kind in ONLINE else {}),
        **({"num_generations": 4} if kind in ("GRPO", "RLOO") else {}),
        **fields,
    }
    if kind in ONLINE:
        given = {"train_dataset": prompt_rows(8), "reward_funcs": [closeness], **given}
    found: dict[str, Any] = {"error": None, "history": []}
    try:
        trainer = made(kind, model, getattr(megalign, f"{kind}Config")(**config), given)
        if change is not None:
            sample = trainer.rollout.generate
            trainer.rollout.generate = lambda *asked: [change(completion) for completion in sample(*asked)]
        try:
            trainer.train()
        finally:
            found["history"] = trainer.state.log_history
            found |= compared(load_file(f"{model}/model.safetensors"), dict(trainer.policy.gathered()))
            if kind == "PPO":
                found["critic_finite"] = compared({}, dict(trainer.critic.gathered()))["finite"]
    except UserError as error:
        found["error"] = str(error)
    return found


def compared(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, bool]:
    return {
        "finite": all(bool(tensor.isfinite().all()) for tensor in after.values()),
        "changed": any(not torch.equal(tensor, after[name]) for name, tensor in before.items()),
    }


def handled(kind: str, model: str, tmp_path: Path, fields: dict[str, Any], *rest: Any, learns: bool = True) -> Any:
    """The history of a run after which all weights are finite and, where something can be learnt, changed."""
    (found,) = run_ranks(1, trained, kind, model, {"output_dir": str(tmp_path), **fields}, *rest)
    assert found["error"] is None
    assert found["finite"] and found["changed"] is learns and found.get("critic_finite", True)
    steps = [line for line in found["history"] if "loss" in line]
    assert len(steps) == 2
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
    return steps


def refused(kind: str, model: str, tmp_path: Path, fields: dict[str, Any], *rest: Any) -> str:
    """The one sentence of a run that is refused; no weight has changed, of a policy that was made."""
    (found,) = run_ranks(1, trained, kind, model, {"output_dir": str(tmp_path), **fields}, *rest)
    assert found["error"] is not None and "\n" not in found["error"]
    assert not found.get("changed", False) and found.get("finite", True)
    return found["error"]


# ---- rows


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def row_of(kind: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """Text, in the trainer's format; SFT learns what is rejected elsewhere."""
    if kind == "SFT":
        return {"prompt": prompt, "completion": rejected}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokens_of(kind: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """The same as tokens, to which nobody adds an end."""
    start, good, bad = ids(prompt), ids(chosen), ids(rejected)
    if kind == "SFT":
        return {"input_ids": start + bad, "completion_mask": [0] * len(start) + [1] * len(bad)}
    if kind == "Reward":
        return {"chosen_ids": start + good, "rejected_ids": start + bad}
    if kind == "KTO":
        return {"prompt_ids": start, "completion_ids": bad, "label": len(good) == 1}
    return {"prompt_ids": start, "chosen_ids": good, "rejected_ids": bad}


BAD_PAIRS: dict[str, tuple[str, str, str]] = {
    "nothing answered": ("t5 t6 ", "t7 ", ""),
    "nothing asked": ("", "t5 t6 t7 ", "t8 t9 "),
    "the same twice": ("t5 t6 ", "t7 t8 ", "t7 t8 "),
    "longer than the limit": ("t5 t6 ", LONG, "t7 "),
    "both longer than the limit": ("t5 t6 ", LONG, LONG),
}


@pytest.mark.parametrize("kind", OFFLINE)
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_row_among_good_ones_does_no_harm(case: str, kind: str, model: str, tmp_path: Path) -> None:
    rows = [row_of(kind, *pair) for pair in (*PAIRS[:3], BAD_PAIRS[case])]
    handled(kind, model, tmp_path, {"max_length": 12}, {"train_dataset": rows})


@pytest.mark.parametrize("kind", OFFLINE)
def test_answers_that_do_not_end_are_learnt_as_they_are(kind: str, model: str, tmp_path: Path) -> None:
    rows = [tokens_of(kind, *pair) for pair in PAIRS]
    assert END not in str(rows).replace("[", " ").replace(",", " ").split()
    handled(kind, model, tmp_path, {}, {"train_dataset": rows})


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_sequence_past_the_models_positions_is_learnt_where_no_limit_is_set(
    kind: str, model: str, tmp_path: Path
) -> None:
    rows = [row_of(kind, *pair) for pair in (*PAIRS[:3], ("t5 ", LONG, "t6 "))]
    handled(kind, model, tmp_path, {"max_length": None}, {"train_dataset": rows})


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_a_row_longer_than_a_pack_is_packed(strategy: str, model: str, tmp_path: Path) -> None:
    rows = [{"text": text} for text in (LONG, "", "t5 ")] * 2
    fields = {"max_length": 12, "packing": True, "packing_strategy": strategy, "per_device_train_batch_size": 1}
    handled("SFT", model, tmp_path, fields, {"train_dataset": rows})


@pytest.mark.parametrize(("kind", "loss"), [("DPO", math.log(2)), ("Reward", math.log(2)), ("KTO", 0.5)])
def test_pairs_that_are_all_the_same_teach_no_preference(kind: str, loss: float, model: str, tmp_path: Path) -> None:
    rows = [row_of(kind, prompt, chosen, chosen) for prompt, chosen, _ in PAIRS]
    fields = {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    steps = handled(kind, model, tmp_path, fields, {"train_dataset": rows}, learns=False)
    assert [line["loss"] for line in steps] == pytest.approx([loss] * 2, abs=1e-6)


def test_every_loss_of_dpo_bears_a_pair_that_is_twice_the_same(model: str, tmp_path: Path) -> None:
    losses = list(choices(DPOConfig, "loss_type"))
    rows = [row_of("DPO", *pair) for pair in (BAD_PAIRS["the same twice"], *PAIRS[:3])]
    assert len(losses) == 15
    handled("DPO", model, tmp_path, {"loss_type": losses, "label_smoothing": 1e-3}, {"train_dataset": rows})


@pytest.mark.parametrize("label", [True, False])
def test_answers_of_one_kind_alone_are_learnt(label: bool, model: str, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": text, "label": label} for prompt, text, _ in PAIRS]
    handled("KTO", model, tmp_path, {}, {"train_dataset": rows})


EMPTY: dict[str, tuple[tuple[str, str, str], str]] = {
    "SFT": (("t5 t6 ", "t7 ", ""), "none of the 2 rows has a loss token"),
    "Reward": (("", "t5 t6 ", "t7 "), "dataset row 1: its rejected has 1 tokens and a score needs 2"),
    "DPO": (("t5 t6 ", "", "t7 "), "dataset row 1: its chosen has no token to learn of"),
    "KTO": (("t5 t6 ", "t7 ", ""), "dataset row 1: its completion has no token to learn of"),
    "ORPO": (("t5 t6 ", "t7 ", ""), "dataset row 1: its rejected has no token to learn of"),
}


@pytest.mark.parametrize("kind", OFFLINE)
def test_tokens_of_an_empty_answer_are_refused_by_their_row(kind: str, model: str, tmp_path: Path) -> None:
    bad, sentence = EMPTY[kind]
    rows = [tokens_of(kind, *(bad if kind == "SFT" else PAIRS[0])), tokens_of(kind, *bad)]
    assert sentence in refused(kind, model, tmp_path, {}, {"train_dataset": rows})


@pytest.mark.parametrize("kind", ONLINE)
def test_a_prompt_that_leaves_no_room_is_refused_by_its_row(kind: str, model: str, tmp_path: Path) -> None:
    rows = [*prompt_rows(7), {"prompt": LONG, "target": 3}]
    sentence = refused(kind, model, tmp_path, {}, {"train_dataset": rows})
    assert "dataset row 7: its prompt has 300 tokens and the limit is 122" in sentence


# ---- completions


def ended_at_once(completion: Completion) -> Completion:
    """Every third is the end token alone, and every third of the others nothing at all."""
    kept = {0: 1, 1: 0}.get(completion.index % 3)
    if kept is None:
        return completion
    tokens = [END][:kept]
    return dataclasses.replace(
        completion, completion_ids=tokens, logprobs=[-4.6][:kept], completion_mask=[True] * kept, finish_reason="stop"
    )


def nothing_but_the_end(completion: Completion) -> Completion:
    return dataclasses.replace(
        completion, completion_ids=[END], logprobs=[-4.6], completion_mask=[True], finish_reason="stop"
    )


def without_an_end(completion: Completion) -> Completion:
    tokens = [token if token != END else 3 for token in completion.completion_ids]
    return dataclasses.replace(completion, completion_ids=tokens, finish_reason="length")


def words(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def number_of_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids)) for ids in completion_ids]


@pytest.mark.parametrize("kind", ONLINE)
def test_completions_that_end_at_once_are_learnt_from(kind: str, model: str, tmp_path: Path) -> None:
    steps = handled(kind, model, tmp_path, {}, {"reward_funcs": [words]}, ended_at_once)
    assert steps[0]["completions/min_length"] == 0


@pytest.mark.parametrize("kind", ONLINE)
def test_completions_that_do_not_end_are_learnt_from(kind: str, model: str, tmp_path: Path) -> None:
    steps = handled(kind, model, tmp_path, {}, {"reward_funcs": [number_of_tokens]}, without_an_end)
    assert steps[0]["completions/clipped_ratio"] == 1.0


@pytest.mark.parametrize("loss_type", choices(GRPOConfig, "loss_type"))
def test_when_all_are_cut_and_masked_no_loss_of_grpo_moves_a_weight(loss_type: str, model: str, tmp_path: Path) -> None:
    fields = {
        "loss_type": loss_type,
        "mask_truncated_completions": True,
        "beta": 0.1,
        "vllm_importance_sampling_mode": "token_truncate",
    }
    handled("GRPO", model, tmp_path, fields, {}, without_an_end, learns=False)


def test_when_all_are_cut_and_masked_rloo_moves_no_weight(model: str, tmp_path: Path) -> None:
    handled("RLOO", model, tmp_path, {"mask_truncated_completions": True}, {}, without_an_end, learns=False)


# ---- rewards


def constant(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.3] * len(completions)


def not_a_number(completions: list[str], **kwargs: Any) -> list[float]:
    """The first group is not scored, the second in one place, the others in three of four."""
    return [math.nan if place < 4 or 4 < place < 8 or place % 4 == 1 else float(len(text))
            for place, text in enumerate(completions)]  # fmt: skip


def never_a_number(completions: list[str], **kwargs: Any) -> list[float]:
    return [math.nan] * len(completions)


def infinite(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0, -math.inf, *[1.0] * (len(completions) - 2)]


def beyond_fp32(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0, 1.0, 1e39, *[1.0] * (len(completions) - 3)]


def enormous(completions: list[str], **kwargs: Any) -> list[float]:
    """fp32 holds each, and not their differences or squares."""
    return [(-1) ** place * 3e38 for place in range(len(completions))]


@pytest.mark.parametrize("given", [[constant], [never_a_number], [constant, never_a_number]])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_groups_of_equal_or_no_rewards_move_no_weight(
    kind: str, given: list[Callable[..., Any]], model: str, tmp_path: Path
) -> None:
    fields = {"beta": 0.0, **({"normalize_advantages": True} if kind == "RLOO" else {"scale_rewards": "batch"})}
    handled(kind, model, tmp_path, fields, {"reward_funcs": given}, learns=False)


def test_equal_rewards_leave_ppo_the_critics_and_the_references_word(model: str, tmp_path: Path) -> None:
    handled("PPO", model, tmp_path, {"whiten_rewards": True}, {"reward_funcs": [constant]}, nothing_but_the_end)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_reward_that_is_not_a_number_does_not_apply(kind: str, model: str, tmp_path: Path) -> None:
    given = {"reward_funcs": [not_a_number], "train_dataset": prompt_rows(8)}
    handled(kind, model, tmp_path, {"per_device_train_batch_size": 16}, given)


def test_ppo_refuses_a_completion_without_a_number(model: str, tmp_path: Path) -> None:
    sentence = refused("PPO", model, tmp_path, {}, {"reward_funcs": [not_a_number]})
    assert "no reward function scored completion 0 of the round" in sentence


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize(("function", "said"), [(infinite, "-inf for completion 1"), (beyond_fp32, "1e+39 for compl")])
def test_an_endless_reward_is_refused_by_its_function(
    function: Callable[..., Any], said: str, kind: str, model: str, tmp_path: Path
) -> None:
    sentence = refused(kind, model, tmp_path, {}, {"reward_funcs": [function]})
    assert f"reward function {function.__name__!r}: it returned {said}" in sentence


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_what_overflows_ends_the_run_before_it_reaches_a_weight(kind: str, model: str, tmp_path: Path) -> None:
    fields = {"max_skipped_steps": 0, **({"scale_rewards": "none"} if kind == "GRPO" else {})}
    sentence = refused(kind, model, tmp_path, fields, {"reward_funcs": [enormous]})
    assert sentence.startswith("a step was skipped, since loss or gradient was not finite (loss ")
    assert "not finite in microbatches of dataset rows 3, 6)" in sentence and "learning_rate" in sentence
