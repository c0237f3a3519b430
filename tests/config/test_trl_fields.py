"""Every field of TRL's configs works here or is refused by name; every field of ours has a reader."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import transformers
import trl
from transformers import TrainerState
from trl.experimental.orpo import ORPOConfig as TrlORPOConfig
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.rloo import RLOOScriptArguments
from trl.scripts.utils import DatasetMixtureConfig
from trl.trainer.base_config import _BaseConfig

import megalign
from megalign.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    LoopConfig,
    ORPOConfig,
    ParallelConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    RolloutConfig,
    SFTConfig,
)
from megalign.config.base import default_of, docs, specs
from megalign.config.refused import RENAMED
from megalign.errors import UserError

# PPOConfig's own fields in TRL 1.12, the last version that has them; it cannot be installed beside 1.16.
PPO_OF_TRL_1_12 = {
    "learning_rate": 3e-6,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "world_size": None,
    "num_total_batches": None,
    "micro_batch_size": None,
    "local_batch_size": None,
    "batch_size": None,
    "local_mini_batch_size": None,
    "mini_batch_size": None,
    "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
}


def _defaults(*classes: type) -> dict[str, object]:
    return {field.name: default_of(field) for cls in classes for field in dataclasses.fields(cls)}


COMMON = (trl.ModelConfig, DatasetMixtureConfig)
THEIRS = {
    SFTConfig: _defaults(trl.SFTConfig, trl.ScriptArguments, *COMMON),
    RewardConfig: _defaults(trl.RewardConfig, trl.ScriptArguments, *COMMON),
    DPOConfig: _defaults(trl.DPOConfig, trl.ScriptArguments, *COMMON),
    KTOConfig: _defaults(trl.KTOConfig, trl.ScriptArguments, *COMMON),
    ORPOConfig: _defaults(TrlORPOConfig, trl.ScriptArguments, *COMMON),
    PPOConfig: _defaults(_BaseConfig, trl.ScriptArguments, *COMMON) | PPO_OF_TRL_1_12,
    GRPOConfig: _defaults(trl.GRPOConfig, GRPOScriptArguments, *COMMON),
    RLOOConfig: _defaults(trl.RLOOConfig, RLOOScriptArguments, *COMMON),
}
OURS = list(THEIRS)
CASES = [pytest.param(name, ours, id=f"{ours.__name__}-{name}") for ours in OURS for name in THEIRS[ours]]
# Where TRL's default would be a trap, or is not ours to give; each says so in its doc.
OTHER_DEFAULTS = {
    *("use_vllm", "disable_dropout", "output_dir", "report_to", "recompute_granularity", "torch_compile"),
    *("sft_model_path", "reward_model_path"),
}
# What TRL does by default and we do not; written out, it is refused.
DEFAULTS_REFUSED_ON_PURPOSE = {
    "dtype",  # bf16 says it
    "train_sampling_strategy",  # shuffle_dataset says it
    "remove_unused_columns",  # PPO's columns go to the reward functions
    "num_sample_generations",  # log_completions shows samples
    "dataloader_pin_memory",  # there is no data loader
    "logging_nan_inf_filter",  # a nan is logged as nan
    "log_on_each_node",
    "prediction_loss_only",  # False: predictions are kept
    "do_train",  # False: nothing is trained
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
}
# Fields that are read through a property or method of the config.
READ_THROUGH = {
    "overlap_grad_reduce": "overlaps_grad_reduce",
    "overlap_param_gather": "overlaps_param_gather",
    "bf16": "params_dtype_name",
    "model_init_kwargs": "params_dtype_name",
    "data_seed": "data_order_seed",
    "fp8_recipe": "fp8_scaling",
    "cast_lm_head_to_fp32": "head_in_fp32",
    "expert_tensor_parallel_size": "expert_tensor_size",
    "vllm_enable_sleep_mode": "engines_sleep",
    "num_generations_eval": "eval_generations",
    "generation_batch_size": "completions_per_generation",
    "steps_per_generation": "microbatches_per_generation",
    "num_mini_batches": "microbatches_per_generation",
    "num_iterations": "passes_per_round",
    "num_ppo_epochs": "passes_per_round",
    "total_episodes": "steps_of_episodes",
}


@pytest.mark.parametrize("name, ours", CASES)
def test_a_field_of_trl_is_ours_or_refused_with_reason_and_nearest_field(name, ours):
    if name in specs(ours):
        return
    with pytest.raises(UserError) as caught:
        ours(**{name: "something else"})
    if name in RENAMED and name not in ours.refused:
        assert str(caught.value) == f"{name} is not a field of {ours.__name__}: its name is {RENAMED[name][0]}; " + (
            f"write {RENAMED[name][0]}"
        )
        return
    refusal = ours.refused[name]
    assert refusal.reason
    assert refusal.nearest.split()[0] in specs(ours)
    assert name in str(caught.value) and refusal.nearest in str(caught.value)
    for value in refusal.inert:
        ours(**{name: value})


@pytest.mark.parametrize("ours", OURS)
def test_defaults_are_trls_unless_the_doc_says_otherwise(ours):
    for name, spec in specs(ours).items():
        if name not in THEIRS[ours] or name in OTHER_DEFAULTS or (ours, name) == (SFTConfig, "shuffle_dataset"):
            continue
        assert default_of(spec) == THEIRS[ours][name], name
    assert docs(PPOConfig)["max_completion_length"].count("response_length")
    assert default_of(specs(PPOConfig)["max_completion_length"]) == PPO_OF_TRL_1_12["response_length"]
    assert "TRL's" in docs(SFTConfig)["shuffle_dataset"] and "TRL's" in docs(KTOConfig)["shuffle_dataset"]
    for name in ("use_vllm", "disable_dropout", "torch_compile"):
        assert "TRL's" in docs(GRPOConfig)[name]


def _refuses(ours: type, name: str, value: object) -> bool:
    try:
        ours(**{name: value})
    except UserError:
        return True
    return False


def test_a_default_of_trl_that_is_written_out_passes_or_is_refused_on_purpose():
    refused = {
        name
        for ours in OURS
        for name, default in THEIRS[ours].items()
        if name in ours.refused and _refuses(ours, name, default)
    }
    assert refused == DEFAULTS_REFUSED_ON_PURPOSE


@pytest.mark.parametrize("ours", OURS)
def test_no_refused_name_is_also_a_field_and_each_names_a_field(ours):
    assert not specs(ours).keys() & ours.refused.keys()
    assert {name for name, refusal in ours.refused.items() if refusal.nearest.split()[0] not in specs(ours)} == set()


@pytest.mark.parametrize("ours", OURS)
def test_a_refused_field_reads_as_what_asks_for_nothing(ours):
    args = ours()
    assert args.push_to_hub is False and args.trust_remote_code is False and args.deepspeed is None
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = args.no_such_field
    with pytest.raises(UserError, match="push_to_hub=True is refused"):
        args.push_to_hub = True


@pytest.mark.parametrize(
    "old, ours, present",
    [
        ("max_seq_length", SFTConfig, "max_length"),
        ("vllm_gpu_utilization", GRPOConfig, "vllm_gpu_memory_utilization"),
        ("vllm_max_model_len", RLOOConfig, "vllm_max_model_length"),
        ("response_length", PPOConfig, "max_completion_length"),
        ("rloo_k", RLOOConfig, "num_generations"),
        ("kl_coef", RLOOConfig, "beta"),
        ("cliprange", RLOOConfig, "epsilon"),
        ("num_ppo_epochs", RLOOConfig, "num_iterations"),
        ("ppo_epochs", PPOConfig, "num_ppo_epochs"),
        ("evaluation_strategy", DPOConfig, "eval_strategy"),
    ],
)
def test_an_old_name_is_refused_naming_the_present_one(old, ours, present):
    with pytest.raises(UserError) as caught:
        ours(**{old: 1})
    assert str(caught.value) == f"{old} is not a field of {ours.__name__}: its name is {present}; write {present}"


@pytest.mark.parametrize(
    "ours, nearest", [(SFTConfig, None), (DPOConfig, "max_length"), (GRPOConfig, "vllm_max_model_length")]
)
def test_max_prompt_length_is_refused_naming_what_limits_prompts_now(ours, nearest):
    with pytest.raises(UserError, match=f"nearest: {nearest}" if nearest else "did you mean max_length"):
        ours(max_prompt_length=512)


def test_an_old_name_is_no_field_where_it_is_old():
    renamed = {old: words for old, words in RENAMED.items() if not any(old in specs(ours) for ours in OURS)}
    assert {"max_seq_length", "vllm_gpu_utilization", "response_length"} <= renamed.keys()
    assert all(any(word in specs(ours) for ours in OURS) for words in RENAMED.values() for word in words)


@pytest.mark.parametrize("ours", [LoopConfig, ParallelConfig, RolloutConfig, *OURS])
def test_every_field_has_a_doc(ours):
    assert all(docs(ours).get(name) for name in specs(ours))


@pytest.mark.parametrize("ours", OURS)
def test_docs_and_reasons_are_plain_ascii_lines(ours):
    words = [*docs(ours).values(), *(refusal.reason for refusal in ours.refused.values())]
    assert all(text.isascii() and "\n" not in text for text in words)


def test_transformers_state_reads_the_step_intervals_and_their_fractions():
    state = TrainerState()
    state.compute_steps(SFTConfig(eval_strategy="steps", logging_steps=0.25, save_steps=7), 50)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (13, 13, 7)
    state.compute_steps(SFTConfig(eval_strategy="steps", eval_steps=0.1), 50)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (10, 5, 500)


@functools.cache
def _sources(root: Path, *, without: str = "\0") -> str:
    return "\n".join(path.read_text() for path in sorted(root.rglob("*.py")) if without not in str(path))


def _read_by_name(package: Path) -> set[str]:
    """The fields that GRPO's trainer hands to the loss by name."""
    source = (package / "trainers/grpo.py").read_text()
    assert "getattr(self.args, name) for name in _LOSS_FIELDS" in source
    return set(re.findall(r'"(\w+)"', source.split("_LOSS_FIELDS = (")[1].split(")")[0]))


@pytest.mark.parametrize("ours", OURS)
def test_every_field_of_ours_has_a_reader(ours):
    package = Path(megalign.__file__).parent
    sources = _sources(package, without="/config/")
    hugging_face = Path(transformers.__file__).parent
    callbacks = (hugging_face / "trainer_callback.py").read_text() + _sources(hugging_face / "integrations")
    assert ".state.compute_steps(" in sources
    by_name = _read_by_name(package) if ours is GRPOConfig else set()
    unread = []
    for name, spec in specs(ours).items():
        if name in ("logging_steps", "eval_steps", "save_steps"):
            continue  # TrainerState.compute_steps reads them by a name it puts together
        if spec.metadata and len(spec.metadata["choices"]) == 1:
            continue  # one legal value: nothing to choose
        read = rf"\b_?(args|config)\.{READ_THROUGH.get(name, name)}\b"
        if name not in by_name and not re.search(read, sources) and not re.search(read, callbacks):
            unread.append(name)
    assert not unread
