"""What a constructor accepts, and what it says otherwise."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from megalign.config import DPOConfig, GRPOConfig, ORPOConfig, PPOConfig, RewardConfig, RLOOConfig, SFTConfig
from megalign.errors import UserError


def error(call, **values) -> str:
    with pytest.raises(UserError) as caught:
        call(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("learning_rte", "learning_rate"),
        ("packin", "packing"),
        ("tensor_parallel_size", "tensor_model_parallel_size"),
        ("batch_size", "per_device_train_batch_size"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_right_one(wrong, right):
    message = error(SFTConfig, **{wrong: 1})
    assert wrong in message and f"did you mean {right}?" in message


def test_a_field_without_a_neighbour_points_to_help():
    assert "--help" in error(SFTConfig, qqqq=1)


def test_fields_are_given_by_name():
    with pytest.raises(UserError, match="output_dir='out'"):
        SFTConfig("out")


def test_an_unknown_attribute_set_later_is_not_dropped():
    args = SFTConfig()
    args.max_steps = 3
    assert args.max_steps == 3
    with pytest.raises(UserError, match="did you mean max_steps"):
        args.max_step = 3


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": "fast"},
        {"learning_rate": float("nan")},
        {"max_steps": 2.5},
        {"max_steps": True},
        {"packing": "yes"},
        {"packing": 1},
        {"lr_scheduler_kwargs": [1]},
        {"output_dir": None},
        {"per_device_train_batch_size": 0},
        {"save_steps": 0},
        {"seed": -1},
        {"adam_beta1": 1.0},
        {"adam_beta2": 1.0},
        {"max_length": 0},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "linea"},
        {"save_strategy": "best"},
        {"packing_strategy": "bfd-requeue"},
        {"context_parallel_size": 0},
        {"virtual_pipeline_model_parallel_size": 0},
        {"expert_model_parallel_size": 0},
        {"sequence_parallel": 1},
        {"transformer_impl": "inference_optimized"},
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_a_way_out(values):
    ((name, value),) = values.items()
    message = error(SFTConfig, **values)
    assert name in message and repr(value) in message and (";" in message)


@pytest.mark.parametrize(
    "values",
    [
        {"use_vllm": False},
        {"vllm_mode": "server"},
        {"loss_type": "gspo"},
        {"top_entropy_quantile": 1.5},
        {"multi_objective_aggregation": "sum"},
        {"num_generations": 1},
        {"temperature": 0.0},
        {"temperature": 0.001},
        {"top_p": 1.1},
        {"scale_rewards": "both"},
        {"disable_dropout": False},
        {"tools": [print]},
        {"use_peft": True},
        {"peft_config": object()},
        {"fp16": True},
        {"fp16": 0},
        {"deepspeed": "zero3.json"},
        {"max_prompt_length": 512},
    ],
)
def test_grpo_refuses_by_name(values):
    ((name, _),) = values.items()
    assert error(GRPOConfig, **values).startswith(name)


def test_values_that_ask_for_nothing_pass():
    GRPOConfig(
        fp16=False,
        use_liger_kernel=False,
        push_to_hub=False,
        deepspeed=None,
        fsdp="",
        use_peft=False,
        tools=None,
    )


def test_values_take_their_fields_form():
    args = SFTConfig(
        output_dir=Path("a") / "b",
        num_train_epochs=2,
        lr_scheduler_type=SchedulerType.COSINE,
        eval_strategy=IntervalStrategy.STEPS,
        report_to="tensorboard",
    )
    assert (args.output_dir, args.num_train_epochs, args.lr_scheduler_type) == ("a/b", 2.0, "cosine")
    assert isinstance(args.num_train_epochs, float)
    assert args.eval_strategy == "steps" and type(args.eval_strategy) is str
    assert args.report_to == ["tensorboard"]
    assert SFTConfig(report_to="none").report_to == [] == SFTConfig().report_to


@pytest.mark.parametrize("given, kept", [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_knows_trls_booleans(given, kept):
    assert GRPOConfig(scale_rewards=given).scale_rewards == kept


def test_resume_true_means_latest_as_in_transformers():
    assert SFTConfig(resume_from_checkpoint=True).resume_from_checkpoint == "latest"
    assert SFTConfig(resume_from_checkpoint=False).resume_from_checkpoint is None


def test_lists_are_not_shared_between_configs():
    first, second = SFTConfig(), SFTConfig()
    first.report_to.append("tensorboard")
    assert second.report_to == []


def test_a_config_is_copied_changed_and_pickled():
    args = GRPOConfig(reward_funcs=["a.b"], max_steps=4, scale_rewards=False)
    assert pickle.loads(pickle.dumps(args)) == args == replace(args)
    assert replace(args, max_steps=5).max_steps == 5


def test_dtype_is_fp32_on_a_cpu_and_what_bf16_says():
    assert SFTConfig(bf16=True).params_dtype_name == "bfloat16"
    assert SFTConfig(bf16=False).params_dtype_name == "float32"
    import torch

    assert SFTConfig().params_dtype_name == ("bfloat16" if torch.cuda.is_available() else "float32")


@pytest.mark.parametrize(
    "call, values",
    [
        (DPOConfig, {"loss_type": "kto_pair"}),
        (DPOConfig, {"loss_type": ["sigmoid", "kto_pair"]}),
        (DPOConfig, {"beta": 0}),
        (DPOConfig, {"ld_alpha": 1.5}),
        (DPOConfig, {"f_divergence_type": "kl"}),
        (DPOConfig, {"dataset_weights": [0.5, 0.0]}),
        (DPOConfig, {"dataset_name": {"path": "a"}}),
        (RewardConfig, {"center_rewards_coefficient": -1}),
        (ORPOConfig, {"max_completion_length": 0}),
        (RLOOConfig, {"num_generations": 1}),
        (RLOOConfig, {"reward_clip_range": "wide"}),
        (PPOConfig, {"kl_estimator": "k2"}),
        (PPOConfig, {"missing_eos_penalty": 0}),
        (PPOConfig, {"lam": 1.1}),
        (PPOConfig, {"stop_token": "</s>"}),
        (PPOConfig, {"generation_batch_size": 8}),
        (PPOConfig, {"dynamic_sampling": True}),
        (RLOOConfig, {"vllm_importance_sampling_correction": True}),
    ],
)
def test_other_configs_refuse_by_name(call, values):
    ((name, _),) = values.items()
    assert error(call, **values).startswith(name)


def test_one_of_several_losses_is_named_in_its_error():
    message = error(DPOConfig, loss_type=["sigmoid", "kto_pair"])
    assert message.startswith("loss_type='kto_pair' is unknown; legal: 'sigmoid', 'hinge'")


def test_one_loss_and_several_are_a_list():
    assert DPOConfig(loss_type="ipo").loss_type == ["ipo"]
    assert DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.1]).loss_weights == [1.0, 0.1]
    assert DPOConfig().loss_type == ["sigmoid"] and DPOConfig().loss_type is not DPOConfig().loss_type


def test_a_dataset_is_a_name_or_a_list_of_names():
    assert SFTConfig(dataset_name=Path("rows.jsonl")).dataset_name == "rows.jsonl"
    assert SFTConfig(dataset_name=("a.jsonl", "b.jsonl")).dataset_name == ["a.jsonl", "b.jsonl"]


def test_model_init_kwargs_say_the_dtype_and_nothing_else():
    import torch

    # What TRL's scripts put there when nothing is asked for.
    asks_nothing = {"revision": "main", "trust_remote_code": False, "attn_implementation": None, "dtype": "float32"}
    args = SFTConfig()
    args.model_init_kwargs = asks_nothing
    args.validate(1)
    assert args.bf16 is None
    assert SFTConfig(model_init_kwargs={"dtype": torch.bfloat16}).params_dtype_name == "bfloat16"
    assert SFTConfig(model_init_kwargs={"torch_dtype": "bfloat16"}).bf16 is True
    assert SFTConfig(model_init_kwargs={"dtype": torch.float32}, bf16=True).params_dtype_name == "bfloat16"
    pickle.dumps(SFTConfig(model_init_kwargs={"dtype": torch.bfloat16}))
    assert "bf16=False" in error(SFTConfig, model_init_kwargs={"dtype": "bfloat16"}, bf16=False)
    assert "'float16'" in error(SFTConfig, model_init_kwargs={"dtype": torch.float16})
    assert "'attn_implementation': 'eager'" in error(SFTConfig, model_init_kwargs={"attn_implementation": "eager"})
    assert "'gguf_file'" in error(SFTConfig, model_init_kwargs={"gguf_file": "x"})


def test_the_given_model_init_kwargs_are_left_as_they_are():
    import torch

    given = {"dtype": torch.bfloat16}
    SFTConfig(model_init_kwargs=given)
    assert given == {"dtype": torch.bfloat16}
