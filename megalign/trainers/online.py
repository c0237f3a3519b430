"""OnlineTrainer: the loop of trainers that learn from their own completions. Read `updates` first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from torch import Tensor

from megalign.data.broken import Skipped
from megalign.data.prompts import prepare_prompts
from megalign.errors import UserError
from megalign.rollout.engine import GenerationParams, RolloutEngine, awake
from megalign.rollout.vllm_engine import NOT_INSTALLED, VllmEngine
from megalign.train_engine import StepResult
from megalign.trainers.arguments import as_list, has_tokenizer, refuse_same_directory
from megalign.trainers.base import DATA_FIELDS, Trainer
from megalign.trainers.dynamic_sampling import Refill
from megalign.trainers.experience import (
    Credited,
    ExperienceMaker,
    Minibatch,
    completion_metrics,
    step_counts,
)
from megalign.trainers.reference import Reference
from megalign.trainers.reporting import print_completions, unique_prompts, write_completions
from megalign.trainers.rewarding import weighted_rewards
from megalign.trainers.sampling import Place, Sampled, Sampling

ONLINE_REFUSED = {
    "tools": "tool calls are not built yet; completions are one turn",
    "rollout_func": "completions are sampled by vLLM in the ranks",
    "environment_factory": "environments are not built yet; score completions with reward_funcs",
}


class OnlineTrainer(Trainer):
    """Samples, scores and learns, round after round; a leaf says what advantage and which loss."""

    data_fields = (*DATA_FIELDS, "num_generations", "passes_per_round", "max_completion_length")
    schedule: list[Minibatch]  # optimizer steps of the current round that are still to come
    refill: Refill | None = None  # dynamic sampling
    corrects_sampler = False  # whether losses are weighed by the trainer's probability over the sampler's
    scores_end_tokens = (
        False  # whether reward models read the token that ended a completion: TRL's GRPO decodes without
    )

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: Any = None,
        args: Any = None,
        *,
        reward_processing_classes: Any = None,
        **given: Any,
    ) -> None:
        self._reward_funcs, self._reward_tokenizers = reward_funcs, reward_processing_classes
        super().__init__(model, args, **given)
        args = self.args
        self.policy.sleep()  # one engine at a time in memory
        self.load_engines()
        rollout = self.make_rollout()
        rollout.sleep()
        self.sampling = Sampling(
            args,
            self.groups,
            self.run,
            policy=self.policy,
            rollout=rollout,
            fresh_rollout=self.make_rollout,
            rewards=self.rewards,
            tokenizer=self.processing_class,
            generation=self.generation_params(),
        )
        self.experience = ExperienceMaker(
            args,
            self.groups,
            self.policy,
            self.reference,
            self.run,
            self.rows.budget(shares_prefixes=self.policy.shares_prefixes),
            needs_old_logprobs=self.needs_old_logprobs(),
            corrects_sampler=self.corrects_sampler,
        )
        self.schedule = []
        self._table: dict[str, list[Any]] = {}

    @property
    def rollout(self) -> RolloutEngine:
        """What samples: after a restart another one."""
        return self.sampling.rollout

    def make_rollout(self) -> RolloutEngine:
        """A fresh engine, which has no weights yet."""
        return VllmEngine(self.model_path, self.args, self.groups)

    def load_engines(self) -> None:
        """The models beside the policy, each asleep until its own pass."""
        self.rewards.load()
        self.reference: Reference | None = None
        if self.needs_reference():
            self.reference = Reference(self.model_path, self.args, self.groups)
            _ = self.reference.engine

    def load_tokenizer(self) -> Any:
        """The model's tokenizer: prompts and completions are text to the reward functions."""
        if not has_tokenizer(self.model_path):
            raise UserError(
                f"model directory {self.model_path} has no tokenizer; add its files or pass processing_class"
            )
        return super().load_tokenizer()

    def make_parts(self) -> None:
        """Reward functions that are found, a weight for each, and vLLM."""
        self.rewards, self.reward_weights = weighted_rewards(
            self.reward_sources(),
            self.args,
            self.groups,
            self._reward_tokenizers,
            end_tokens_of=self.processing_class if self.scores_end_tokens else None,
        )
        models = {f"reward model {model.name}": model.path for model in self.rewards.models.values()}
        refuse_same_directory(self.args.output_dir, models)
        if find_spec("vllm") is None:
            raise UserError(NOT_INSTALLED)

    # ---- what a leaf says

    def with_advantages(self, minibatches: list[Minibatch], rewards: Tensor, num_generations: int) -> Credited:
        """The minibatches with what the loss reads of the rewards [N, F] of whole groups."""
        raise NotImplementedError

    def generation_params(self) -> GenerationParams:
        """How completions are sampled; the tokenizer's end token ends one, beside the model's own, unless both are
        to be ignored."""
        args, extra = self.args, self.args.generation_kwargs or {}
        stop = None if extra.get("ignore_eos") else self.processing_class.eos_token_id
        return GenerationParams(
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            stop_token_ids=() if stop is None else (stop,),
            extra=extra,
        )

    def needs_reference(self) -> bool:
        """Whether the policy is held near the model that it began as."""
        raise NotImplementedError

    def needs_old_logprobs(self) -> bool:
        """Whether a step's policy may not be the one that sampled; else its own logprobs are the old ones."""
        return self.updates_per_round > 1

    def with_step_columns(self, minibatch: Minibatch) -> Minibatch:
        """With columns that only the policy of the very step knows."""
        return minibatch

    def learn(self) -> Iterator[StepResult]:
        """The optimizer steps of the schedule, the policy awake for them."""
        with awake(self.policy):
            while self.schedule:
                minibatch = self.with_step_columns(self.schedule.pop(0))
                self.run.window.add(minibatch.metrics)
                result = self.take_step(minibatch)
                self.sampling.policy_changed()
                yield result

    def take_step(self, minibatch: Minibatch) -> StepResult:
        """One optimizer step."""
        return self.update(minibatch.batches, minibatch.counts)

    def after_credit(self, credited: Credited) -> None:
        """Called once for each round that is learned from, when it is known what it was worth."""

    def before_steps(self, schedule: list[Minibatch]) -> list[Minibatch]:
        """Called once for each round, with all of its optimizer steps, before the first of them."""
        return schedule

    # ---- the loop

    def updates(self, epoch: int, first: int) -> Iterator[StepResult]:
        """One epoch: sample, score, then the optimizer steps of that round; yields after each step."""
        if first % self.updates_per_round == 0:
            self.schedule = []  # of a round that a callback cut short
        for number, prompts in self._rounds(epoch, first):
            if not self.schedule:  # else a checkpoint was taken in the middle of this round
                self.schedule = self.before_steps(self._learnable(self._sample(prompts, number), number))
            yield from self.learn()

    def _sample(self, prompts: list[dict[str, Any]], number: int) -> Sampled:
        """The round's completions and what they are worth; with dynamic_sampling, of groups that teach something."""

        def draw(some: list[dict[str, Any]], part: int) -> Sampled:
            return self.sampling(some, self.args.num_generations, Place("train", number, part))

        first = draw(prompts, 0)
        if self.refill is None:
            return first
        filled, metrics = self.refill.filled(first, draw, self.train_rows, len(prompts))
        self.run.window.add(metrics)
        return filled

    def _learnable(self, sampled: Sampled, number: int) -> list[Minibatch]:
        """The round's optimizer steps, in order; its metrics go to the log."""
        with self.run.phases("data"):
            minibatches = self.experience.minibatches(
                sampled.completions, step=number, num_updates=self.updates_per_pass
            )
        minibatches, metrics = self.experience.add_columns(minibatches)
        credited = self.with_advantages(minibatches, sampled.scored.rewards, self.args.num_generations)
        self.after_credit(credited)
        self._note_round(sampled, credited.advantages)
        self.run.window.add({**metrics, **credited.metrics})
        return credited.minibatches * self.args.passes_per_round

    def _note_round(self, sampled: Sampled, advantages: Tensor) -> None:
        completions, scored = sampled
        self.run.window.add({**completion_metrics(completions), **scored.metrics})
        self.run.count_tokens(
            sum(len(completion.prompt_ids) + len(completion.completion_ids) for completion in completions)
        )
        if self.args.log_completions and self.state.is_world_process_zero:
            self._table = {
                "prompt": [completion.row["prompt"] for completion in completions],
                "completion": self.sampling.texts(completions),
                **dict(zip(self.rewards.names, scored.rewards.T.tolist(), strict=True)),
                **scored.extra,
                "advantage": advantages.tolist(),
            }

    # ---- evaluation

    def evaluation(self, rows: Dataset) -> dict[str, float]:
        """Each prompt once, `num_generations_eval` completions each; the policy's loss on them as well."""
        with self.policy.kept_as_it_was():  # a step may follow in the same round
            return self._evaluation(rows)

    def _evaluation(self, rows: Dataset) -> dict[str, float]:
        group = self.args.eval_generations
        completions, scored = self.sampling(list(rows), group, Place("eval"))
        everything = range(len(completions))
        micro_batch = self.args.per_device_eval_batch_size
        whole = Minibatch(
            batches=self.experience.batches(completions, everything, micro_batch),
            counts=step_counts(self.experience.loss_tokens(completions), everything),
        )
        minibatches, sampling = self.experience.add_columns([whole])
        credited = self.with_advantages(minibatches, scored.rewards, group)
        (whole,) = credited.minibatches
        with awake(self.policy):
            whole = self.with_step_columns(whole)
            loss = self.policy.eval_step(whole.batches, self.loss, counts=whole.counts)
        return {**loss, **completion_metrics(completions), **sampling, **credited.metrics, **scored.metrics}

    # ---- rounds, state

    def settings(self) -> dict[str, Any]:
        """The completions of a round."""
        return {**super().settings(), "completions of a round": self.round_size}

    @property
    def round_size(self) -> int:
        """Completions between two generations."""
        return self.args.completions_per_generation(self.groups.dp.size)

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps that go once through a round."""
        return self.args.microbatches_per_generation(self.groups.dp.size) // self.args.gradient_accumulation_steps

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps between two generations."""
        return self.updates_per_pass * self.args.passes_per_round

    @property
    def rounds_per_epoch(self) -> int:
        """Generations in an epoch; prompts that do not fill a round wait for the next epoch, as in TRL."""
        return len(self.train_rows) // (self.round_size // self.args.num_generations)

    def rows_of(self, steps: int) -> int:
        """Prompts of all the rounds that the steps learn from."""
        return -(-steps // self.updates_per_round) * (self.round_size // self.args.num_generations)

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

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """Rows with prompt_ids beside the dataset's own columns."""
        model = self.architecture
        limits = {"max_positions": model.max_position_embeddings, "vocab_size": model.vocab_size}
        return prepare_prompts(dataset, self.processing_class, self.args, **limits, skipped=skipped)

    def loop_state(self) -> dict[str, Any]:
        """Where dynamic sampling stands in the prompts, and the round's table until a line is due."""
        # As text: what reward functions add to it may be anything, and a checkpoint holds plain values.
        state = {"table": json.dumps(self._table, default=str)}
        return state if self.refill is None else {**state, "refill": self.refill.state_dict()}

    def replica_state(self) -> list[dict[str, Any]]:
        """The optimizer steps that were sampled for but not yet taken."""
        return [minibatch.state() for minibatch in self.schedule]

    def restore_loop_state(self, state: Mapping[str, Any], replicas: Sequence[Any]) -> None:
        """Goes on in the middle of a round, its sequences dealt out to the replicas that there are now."""
        self.sampling.policy_changed()
        schedules = [[Minibatch.from_state(minibatch) for minibatch in schedule] for schedule in replicas]
        self.schedule = [self.experience.dealt_anew(parts) for parts in zip(*schedules, strict=True)]
        self._table = json.loads(state["table"])
        if self.refill is not None:
            self.refill.load_state_dict(state["refill"])

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
        first_round = first // self.updates_per_round
        sampler = self.rows.sampler(len(self.train_rows), size, epoch=epoch, position=first_round, drop_last=True)
        for number in range(sampler.position, sampler.batches_per_epoch):
            prompts = [self.train_rows[row] for row in next(sampler)]
            yield epoch * sampler.batches_per_epoch + number, prompts

    def reward_sources(self) -> list[Any]:
        """The constructor's reward_funcs, else the config's."""
        return as_list(self.args.reward_funcs if self._reward_funcs is None else self._reward_funcs)
