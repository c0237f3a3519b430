"""What a layout and a batch must satisfy, and the derived sizes; expected numbers by hand."""

from __future__ import annotations

import pytest

from megalign.config import DPOConfig, GRPOConfig, KTOConfig, PPOConfig, RLOOConfig, SFTConfig
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


@pytest.mark.parametrize(
    ("on_cuda", "fields", "overlaps"),
    [
        (False, {}, (False, False)),
        (True, {}, (True, True)),
        (True, {"use_distributed_optimizer": False}, (True, False)),
        (True, {"overlap_grad_reduce": False}, (False, False)),
        (True, {"overlap_param_gather": False}, (True, False)),
        (False, {"overlap_grad_reduce": True}, (True, True)),
    ],
)
def test_communication_is_overlapped_on_gpus_unless_said_otherwise(on_cuda, fields, overlaps, monkeypatch):
    monkeypatch.setattr("megalign.device.on_cuda", lambda: on_cuda)
    args = SFTConfig(**fields)
    assert (args.overlaps_grad_reduce, args.overlaps_param_gather) == overlaps


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


def test_experts_are_split_over_the_ranks_of_a_replica():
    args = GRPOConfig(vllm_enable_expert_parallel=True)
    assert "vllm_tensor_parallel_size above 1" in error(args, 2)
    args.vllm_tensor_parallel_size = 2
    args.validate(2)


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


def test_a_replica_gives_up_before_those_that_wait_for_it():
    GRPOConfig(vllm_timeout=1799).validate(2)
    message = error(GRPOConfig(vllm_timeout=1800), 2)
    assert "vllm_timeout 1800" in message and "ddp_timeout 1800" in message
    GRPOConfig(vllm_timeout=1800).validate(1)
    GRPOConfig(vllm_timeout=1800, vllm_tensor_parallel_size=2).validate(2)
    GRPOConfig(vllm_timeout=None).validate(2)


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


def test_every_dataset_of_a_mixture_has_a_weight():
    names = ["a.jsonl", "b.jsonl"]
    SFTConfig(dataset_name=names).validate(1)
    SFTConfig(dataset_name=names, dataset_weights=[3, 0.5]).validate(1)
    assert "3 values for 2 datasets" in error(SFTConfig(dataset_name=names, dataset_weights=[1, 1, 1]), 1)
    assert "2 values for 1 datasets" in error(SFTConfig(dataset_name="a.jsonl", dataset_weights=[1, 1]), 1)
    assert "1 values for 0 datasets" in error(SFTConfig(dataset_weights=[1]), 1)
    assert "dataset_name=[]" in error(SFTConfig(dataset_name=[]), 1)


def test_a_stream_needs_max_steps():
    assert "streaming=True needs max_steps" in error(SFTConfig(streaming=True), 1)
    SFTConfig(streaming=True, max_steps=1).validate(1)


@pytest.mark.parametrize(
    "values, part",
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 values for 2 losses"),
        ({"loss_type": []}, "loss_type=[]"),
        ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "no form for loss_type aot;"),
        ({"loss_type": ["ipo", "bco_pair", "apo_zero"], "f_divergence_type": "js_divergence"}, "bco_pair, apo_zero;"),
        ({"loss_type": "aot_unpaired", "use_weighting": True}, "use_weighting=True"),
        ({"loss_type": "exo_pair"}, "label_smoothing=0.0"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"loss_type": ["sigmoid", "ipo"], "label_smoothing": 0.1}, "no effect on loss_type sigmoid, ipo: only robust"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "sync_ref_model=True"),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size=4"),
    ],
)
def test_dpo_refuses_what_its_losses_cannot_do(values, part):
    assert part in error(DPOConfig(**values), 1)


@pytest.mark.parametrize(
    "values",
    [
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": "robust"},
        {"loss_type": "robust", "label_smoothing": 0.49},
        {"loss_type": ["sigmoid", "aot"], "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "sft", "ipo"], "f_divergence_type": "alpha_divergence", "loss_weights": [1, 1, 2]},
        {"loss_type": "bco_pair", "use_weighting": True},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4},
    ],
)
def test_dpo_takes_what_its_losses_can_do(values):
    DPOConfig(**values).validate(1)


def test_kto_needs_two_rows_in_a_step_over_the_whole_job():
    one = {"per_device_train_batch_size": 1}
    assert "1 row" in error(KTOConfig(**one), 1)
    KTOConfig(**one).validate(2)
    KTOConfig(**one, gradient_accumulation_steps=2).validate(1)
    KTOConfig(**one, loss_type="apo_zero_unpaired").validate(1)


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"loss_type": "cispo", "delta": 4.0}, ["delta=4.0", "'cispo'"]),
        ({"loss_type": "vespo"}, ["vllm_importance_sampling_mode='sequence_mask'", "token_truncate"]),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            ["scale_rewards='none'", "normalize_then_sum"],
        ),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, ["entropy_coef=2.0", "entropy_coef_max 1.0"]),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 0.1}, ["entropy_coef=0.0", "entropy_coef_min 0.1"]),
        ({"overlong_buffer_length": 513}, ["overlong_buffer_length 513", "max_completion_length 512"]),
        ({"sync_ref_model": True}, ["sync_ref_model=True", "beta"]),
    ],
)
def test_grpo_refuses_what_its_loss_would_not_read(values, parts):
    message = error(GRPOConfig(**values), 1)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "values",
    [
        {"loss_type": "luspo", "delta": 4.0, "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"},
        {"loss_type": "vespo", "vllm_importance_sampling_correction": False},
        {"use_adaptive_entropy": True, "entropy_coef": 1.0, "entropy_coef_min": 1.0},
        {"overlong_buffer_length": 512},
        {"sync_ref_model": True, "beta": 0.01},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
)
def test_grpo_takes_what_its_loss_reads(values):
    GRPOConfig(**values).validate(1)


@pytest.mark.parametrize("ends", [[1.0], [1.0, 1.0], [2.0, 1.0], [-1.0, 0.0, 1.0]])
def test_a_range_of_rewards_has_two_ends(ends):
    assert f"reward_clip_range={ends}" in error(RLOOConfig(reward_clip_range=ends), 1)
    RLOOConfig(reward_clip_range=(-1, 1)).validate(1)


def test_ppo_samples_for_all_minibatches_of_a_round():
    args = PPOConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_mini_batches=3)
    args.validate(2)
    assert args.microbatches_per_generation(2) == 6
    assert args.completions_per_generation(2) == 48
    assert args.passes_per_round == 4 and args.eval_generations == 1
    assert "generation_batch_size 8" in error(PPOConfig(num_generations=3), 1)


def test_ppo_turns_episodes_into_optimizer_steps():
    args = PPOConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_mini_batches=3)
    assert args.steps_of_episodes(2) is None
    args.total_episodes = 97  # three rounds of 48
    assert args.steps_of_episodes(2) == 3 * 3 * 4
    args.total_episodes = 96
    assert args.steps_of_episodes(2) == 2 * 3 * 4


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"stop_token": "eos", "stop_token_id": 2}, ["stop_token='eos'", "stop_token_id=2"]),
        ({"total_episodes": 8, "max_steps": 1}, ["total_episodes=8", "max_steps=1"]),
        ({"kl_target": 6.0, "kl_coef": 0.0}, ["kl_target=6.0", "kl_coef"]),
        ({"max_steps": 5, "critic_warmup_steps": 5}, ["critic_warmup_steps 5", "5 optimizer steps"]),
        ({"total_episodes": 8, "critic_warmup_steps": 4}, ["critic_warmup_steps 4", "4 optimizer steps"]),
        ({"reward_funcs": ["a.b"], "reward_model_path": "rm", "reward_weights": [1.0]}, ["1 values for 2 rewards"]),
        ({"max_completion_length": 20, "overlong_buffer_length": 21}, ["overlong_buffer_length 21"]),
    ],
)
def test_ppo_refuses_what_is_said_twice_or_has_no_effect(values, parts):
    message = error(PPOConfig(**values), 1)
    assert all(part in message for part in parts), message


def test_ppo_takes_a_warmup_that_leaves_steps_and_a_weight_for_each_reward():
    PPOConfig(max_steps=5, critic_warmup_steps=4).validate(1)
    PPOConfig(reward_funcs=["a.b"], reward_model_path="rm", reward_weights=[1.0, 2.0]).validate(1)
    PPOConfig(reward_model_path="rm", reward_weights=[2.0], kl_target=6.0, stop_token="eos").validate(1)
