"""What a layout and a batch must satisfy, and the derived sizes; expected numbers by hand."""

from __future__ import annotations

import pytest

from megalign.config import GRPOConfig, SFTConfig
from megalign.errors import UserError


def error(args, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        args.validate(world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_world_divides_by_the_model_parallel_size():
    args = SFTConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    args.validate(8)
    assert args.data_parallel_size(8) == 2
    message = error(args, 6)
    assert "world size 6" in message and "= 4" in message and "multiple of 4" in message
    assert "world size 2" in error(args, 2)


def test_generation_batch_is_what_trl_says():
    args = GRPOConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4)
    args.validate(2)
    assert args.microbatches_per_generation(2) == 2
    assert args.completions_per_generation(2) == 16
    args = GRPOConfig(per_device_train_batch_size=4, generation_batch_size=32, num_generations=8)
    args.validate(2)
    assert args.microbatches_per_generation(2) == 4
    args = GRPOConfig(per_device_train_batch_size=4, steps_per_generation=3, num_generations=8)
    args.validate(2)
    assert args.completions_per_generation(2) == 24


def test_generation_batch_divides_by_groups():
    message = error(GRPOConfig(per_device_train_batch_size=6, num_generations=4), 1)
    assert "generation_batch_size 6" in message and "num_generations 4" in message


def test_generation_batch_divides_by_microbatches():
    message = error(GRPOConfig(per_device_train_batch_size=8, generation_batch_size=12, num_generations=4), 1)
    assert "generation_batch_size 12" in message and "= 8" in message


def test_optimizer_steps_do_not_straddle_rounds_of_sampling():
    message = error(GRPOConfig(gradient_accumulation_steps=2, steps_per_generation=3), 1)
    assert "steps_per_generation 3" in message and "gradient_accumulation_steps 2" in message


def test_generation_batch_is_said_once():
    assert "twice" in error(GRPOConfig(generation_batch_size=8, steps_per_generation=1), 1)


def test_evaluation_batch_holds_whole_groups_when_there_is_evaluation():
    args = GRPOConfig(per_device_eval_batch_size=6, num_generations_eval=4)
    args.validate(1)
    args.eval_on_start = True
    message = error(args, 1)
    assert "per_device_eval_batch_size 6" in message and "num_generations_eval 4" in message
    args.validate(2)


def test_vllm_replicas_divide_the_world():
    assert "vllm_tensor_parallel_size 4" in error(GRPOConfig(vllm_tensor_parallel_size=4), 6)


def test_a_prompt_has_room_beside_the_completion():
    assert "max_completion_length 512" in error(GRPOConfig(vllm_max_model_length=512), 1)


@pytest.mark.parametrize("low, high", [(3.0, 3.0), (4.0, 3.0), (None, None)])
def test_importance_ratio_needs_a_range(low, high):
    args = GRPOConfig(vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high)
    assert "vllm_importance_sampling_clip_max" in error(args, 1)


def test_reward_weights_match_the_functions():
    assert "2 values for 1" in error(GRPOConfig(reward_funcs=["a.b"], reward_weights=[1.0, 2.0]), 1)


@pytest.mark.parametrize("name", ["logging_steps", "eval_steps", "save_steps", "warmup_steps"])
def test_step_intervals_are_whole_or_fractions(name):
    SFTConfig(**{name: 0.5}).validate(1)
    SFTConfig(**{name: 2}).validate(1)
    assert f"{name}=2.5" in error(SFTConfig(**{name: 2.5}), 1)


def test_the_reward_functions_give_up_before_the_ranks_that_wait_for_them():
    GRPOConfig(reward_timeout=1799).validate(1)
    message = error(GRPOConfig(reward_timeout=1800), 1)
    assert "reward_timeout 1800" in message and "ddp_timeout 1800" in message
    assert "ddp_timeout 60 " in error(GRPOConfig(ddp_timeout=60), 1)


def test_evaluation_rows_are_not_given_in_vain():
    assert "eval_dataset_name='held_out.jsonl'" in error(SFTConfig(eval_dataset_name="held_out.jsonl"), 1)
    SFTConfig(eval_dataset_name="held_out.jsonl", eval_on_start=True).validate(1)
    SFTConfig(eval_dataset_name="held_out.jsonl", eval_strategy="epoch").validate(1)


@pytest.mark.parametrize("packing", ["packing", "eval_packing"])
def test_the_end_of_a_row_is_not_kept_by_packing(packing):
    assert "keep_end" in error(SFTConfig(truncation_mode="keep_end", **{packing: True}), 1)
    SFTConfig(truncation_mode="keep_end").validate(1)


def test_packing_needs_a_length():
    assert "max_length" in error(SFTConfig(packing=True, max_length=None), 1)


def test_values_set_after_construction_are_checked():
    args = SFTConfig()
    args.max_steps = 0
    assert "max_steps=0" in error(args, 1)
    args.max_steps = "many"
    assert "max_steps='many'" in error(args, 1)


def test_recomputation_is_not_both_off_and_on():
    args = SFTConfig(gradient_checkpointing=False, recompute_granularity="full")
    assert "gradient_checkpointing=False" in error(args, 1)
