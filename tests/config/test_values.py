"""What a constructor accepts, and what it says otherwise."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from megalign.config import GRPOConfig, SFTConfig
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
        {"max_length": 0},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "linea"},
        {"save_strategy": "best"},
        {"packing_strategy": "bfd-requeue"},
        {"context_parallel_size": 2},
        {"virtual_pipeline_model_parallel_size": 2},
        {"expert_model_parallel_size": 2},
        {"sequence_parallel": True},
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
        {"loss_type": "cispo"},
        {"loss_type": "sapo"},
        {"loss_type": "gspo"},
        {"num_generations": 1},
        {"temperature": 0.0},
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
