"""Every field of TRL 1.16's configs works here or is refused by name; every field of ours has a reader."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import transformers
import trl
from transformers import TrainerState
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.utils import DatasetMixtureConfig

import megalign
from megalign.config import GRPOConfig, LoopConfig, ParallelConfig, RolloutConfig, SFTConfig
from megalign.config.base import default_of, docs, specs
from megalign.errors import UserError

PAIRS = [(trl.SFTConfig, SFTConfig), (trl.GRPOConfig, GRPOConfig)]
CASES = [
    pytest.param(field, ours, id=f"{ours.__name__}-{field.name}")
    for theirs, ours in PAIRS
    for config in (theirs, trl.ModelConfig, GRPOScriptArguments, DatasetMixtureConfig)
    for field in dataclasses.fields(config)
    if ours is GRPOConfig or "reward" not in field.name
]
# Where TRL's default would be a trap, or what we do not have; each says so in its doc.
OTHER_DEFAULTS = {"use_vllm", "disable_dropout", "output_dir", "report_to", "recompute_granularity"}
# Fields that are read through a property or method of the config.
READ_THROUGH = {
    "bf16": "params_dtype_name",
    "data_seed": "data_order_seed",
    "vllm_enable_sleep_mode": "engines_sleep",
    "num_generations_eval": "eval_generations",
    "generation_batch_size": "completions_per_generation",
    "steps_per_generation": "microbatches_per_generation",
}


@pytest.mark.parametrize("theirs, ours", CASES)
def test_a_field_of_trl_is_ours_or_refused_with_reason_and_nearest_field(theirs, ours):
    if theirs.name in specs(ours):
        return
    refusal = ours.refused[theirs.name]
    assert refusal.reason
    assert refusal.nearest.split()[0] in specs(ours)
    with pytest.raises(UserError) as caught:
        ours(**{theirs.name: "something else"})
    assert theirs.name in str(caught.value) and refusal.nearest in str(caught.value)
    for value in refusal.inert:
        ours(**{theirs.name: value})


@pytest.mark.parametrize("theirs, ours", PAIRS)
def test_defaults_are_trls_unless_the_doc_says_otherwise(theirs, ours):
    trls = {field.name: default_of(field) for field in dataclasses.fields(theirs)}
    for name, spec in specs(ours).items():
        if name not in trls or name in OTHER_DEFAULTS or (ours, name) == (SFTConfig, "shuffle_dataset"):
            continue
        assert default_of(spec) == trls[name], name
    assert "TRL's" in docs(SFTConfig)["shuffle_dataset"]
    assert "TRL's" in docs(GRPOConfig)["use_vllm"] and "TRL's" in docs(GRPOConfig)["disable_dropout"]


@pytest.mark.parametrize("ours", [SFTConfig, GRPOConfig])
def test_no_refused_name_is_also_a_field(ours):
    assert not specs(ours).keys() & ours.refused.keys()


@pytest.mark.parametrize("ours", [LoopConfig, ParallelConfig, RolloutConfig, SFTConfig, GRPOConfig])
def test_every_field_has_a_doc(ours):
    assert all(docs(ours).get(name) for name in specs(ours))


def test_transformers_state_reads_the_step_intervals_and_their_fractions():
    state = TrainerState()
    state.compute_steps(SFTConfig(eval_strategy="steps", logging_steps=0.25, save_steps=7), 50)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (13, 13, 7)
    state.compute_steps(SFTConfig(eval_strategy="steps", eval_steps=0.1), 50)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (10, 5, 500)


def _sources(root: Path, *, without: str = "\0") -> str:
    return "\n".join(path.read_text() for path in sorted(root.rglob("*.py")) if without not in str(path))


def test_every_field_of_ours_has_a_reader():
    package = Path(megalign.__file__).parent
    ours = _sources(package, without="/config/")
    hugging_face = Path(transformers.__file__).parent
    callbacks = (hugging_face / "trainer_callback.py").read_text() + _sources(hugging_face / "integrations")
    assert ".state.compute_steps(" in ours
    unread = []
    for config in (SFTConfig, GRPOConfig):
        for name, spec in specs(config).items():
            if name in ("logging_steps", "eval_steps", "save_steps"):
                continue  # TrainerState.compute_steps reads them by a name it puts together
            if spec.metadata and len(spec.metadata["choices"]) == 1:
                continue  # one legal value: nothing to choose
            read = rf"\b(args|config)\.{READ_THROUGH.get(name, name)}\b"
            if not re.search(read, ours) and not re.search(read, callbacks):
                unread.append(f"{config.__name__}.{name}")
    assert not unread
