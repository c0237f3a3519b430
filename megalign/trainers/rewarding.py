"""Rewarding: reward functions and reward models, in the order in which they were given, as one [N, F] table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.batch import Completion
from megalign.conversion.families import is_classifier
from megalign.conversion.hf_files import read_config
from megalign.data.chat import as_messages, chat_ids, is_conversation, load_tokenizer, special_tokens_of
from megalign.data.collate import packed_share
from megalign.data.rows import check_tokens
from megalign.data.scored import check_scored, pad_of, scored_sequence
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.reduce import gather_rows
from megalign.rollout.engine import awake
from megalign.rollout.reward_functions import get_soft_overlong_punishment
from megalign.rollout.rewards import RewardResult, RewardRunner, distinct
from megalign.train_engine import TrainEngine
from megalign.trainers.arguments import has_tokenizer


class RewardModel:
    """A sequence classifier of one label on the ranks, sharded as the policy is."""

    def __init__(self, path: str, args: Any, groups: ParallelGroups, tokenizer: Any = None) -> None:
        self.path, self._args, self._groups = path, args, groups
        self.name = Path(path).name
        if not is_classifier(read_config(path)):
            raise UserError(
                f"reward model {path} has no score head: it is a language model; train one from it with `megalign "
                "reward`, or name a *ForSequenceClassification"
            )
        if tokenizer is None and not has_tokenizer(path):
            raise UserError(
                f"reward model {path} has no tokenizer; add its files or pass reward_processing_classes, one a function"
            )
        self._tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer

    def load(self) -> None:
        """Reads the weights; a collective over the model copy."""
        self.engine = TrainEngine(self.path, self._args, self._groups, trainable=False, score_head=True)
        self.engine.sleep()

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str], ends: Sequence[str | None]) -> Tensor:
        """[N] scores, on every rank; each text, with the end token that it has in `ends`, is read by one data-parallel
        replica. Collective."""

        def sequences_of(part: list[int]) -> list[dict[str, list[Any]]]:
            return [self._sequence(prompts[i], texts[i], ends[i]) for i in part]

        micro_batch = self._args.per_device_train_batch_size
        share = packed_share(range(len(texts)), sequences_of, self._groups, micro_batch=micro_batch)
        with awake(self.engine):
            columns = self.engine.forward([batch for _, batch in share.microbatches], ("scores",))
        mine: dict[int, float] = {}
        for (part, batch), column in zip(share.microbatches, columns, strict=True):
            mine.update(zip(part, batch.per_sequence_sum(column["scores"].cpu()).tolist(), strict=True))
        scores = torch.tensor(gather_rows(mine, self._groups.dp))
        if not scores.isfinite().all():
            worst = int((~scores.isfinite()).nonzero()[0])
            raise UserError(f"reward model {self.path} scores completion {worst} as {scores[worst]}; check its weights")
        return scores

    def _sequence(self, prompt: Any, text: str, end: str | None) -> dict[str, list[Any]]:
        if is_conversation(prompt):
            messages = [*as_messages(prompt), {"role": "assistant", "content": text}]
            ids = chat_ids(self._tokenizer, messages, options=self._args.chat_template_kwargs or {})
        else:
            ids = self._tokenizer(text=prompt + text, add_special_tokens=False)["input_ids"]
            if end is not None:  # a chat template ends a message itself
                known = end in self._tokenizer.all_special_tokens
                own = self._tokenizer.convert_tokens_to_ids(end) if known else self._tokenizer.eos_token_id
                ids += [] if own is None else [own]
        architecture = self.engine.architecture
        check_tokens(ids, architecture.vocab_size)
        pad = pad_of(special_tokens_of(self._tokenizer), architecture.pad_token_id)
        check_scored(ids, None, f"what reward model {self.name} reads of prompt and completion")
        return scored_sequence(ids, pad)


class Rewarding:
    """What all of the job's completions are worth, by each function and model; every rank gets the table."""

    def __init__(
        self,
        chosen: Sequence[Any],
        args: Any,
        groups: ParallelGroups,
        tokenizers: Sequence[Any] | None = None,
        *,
        end_tokens_of: Any = None,
    ) -> None:
        """`end_tokens_of`: the policy's tokenizer, where reward models read the end token of a completion as well."""
        self._end_tokens_of = end_tokens_of
        given = tokenizers or [None] * len(chosen)
        self.models = {
            place: RewardModel(str(what), args, groups, tokenizer)
            for place, (what, tokenizer) in enumerate(zip(chosen, given, strict=True))
            if is_model(what)
        }
        functions = [what for place, what in enumerate(chosen) if place not in self.models]
        # With nothing at all, the runner says what is missing.
        self._runner = RewardRunner(functions, groups, timeout=args.reward_timeout) if functions or not chosen else None
        names = iter(self._runner.names if self._runner else [])
        self.names = distinct(
            [self.models[place].name if place in self.models else next(names) for place in range(len(chosen))]
        )

    def load(self) -> None:
        """Reads the reward models."""
        for model in self.models.values():
            model.load()

    def __call__(
        self, completions: list[Completion], prompts: list[Any], texts: list[str], **options: Any
    ) -> RewardResult:
        """RewardRunner's result with the models' columns at their places."""
        empty = torch.empty(len(completions), 0)
        found = RewardResult(rewards=empty, extra={}, metrics={})
        if self._runner is not None:
            found = self._runner(completions, prompts, texts, **options)
        columns = iter(found.rewards.unbind(dim=1))
        ends = [self._end_of(completion) for completion in completions]
        table = [
            self.models[place](prompts, texts, ends) if place in self.models else next(columns)
            for place in range(len(self.names))
        ]
        return replace(found, rewards=torch.stack(table, dim=1))

    def _end_of(self, completion: Completion) -> str | None:
        """The special token that a completion ended with, which its text does not show."""
        tokenizer, ids = self._end_tokens_of, completion.completion_ids
        if (
            tokenizer is None
            or completion.finish_reason != "stop"
            or not ids
            or ids[-1] not in tokenizer.all_special_ids
        ):
            return None
        return tokenizer.convert_ids_to_tokens(ids[-1])


def weighted_rewards(
    chosen: Sequence[Any], args: Any, groups: ParallelGroups, tokenizers: Any = None, *, end_tokens_of: Any = None
) -> tuple[Rewarding, Tensor]:
    """What scores completions, the penalty of overlong ones among it, and the weight of each part; see Rewarding."""
    chosen, weights = list(chosen), list(args.reward_weights or [1.0] * len(chosen))
    if len(weights) != len(chosen):
        raise UserError(f"reward_weights has {len(weights)} values for {len(chosen)} reward functions; give one each")
    if tokenizers is not None:
        tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers]
        if len(tokenizers) != len(chosen):
            raise UserError(
                f"reward_processing_classes has {len(tokenizers)} entries for {len(chosen)} reward functions; give one "
                "for each, None for a function"
            )
    if chosen and args.overlong_buffer_length is not None:
        chosen.append(get_soft_overlong_punishment(args.max_completion_length, args.overlong_buffer_length))
        weights.append(args.overlong_penalty)
        tokenizers = None if tokenizers is None else [*tokenizers, None]
    return Rewarding(chosen, args, groups, tokenizers, end_tokens_of=end_tokens_of), torch.tensor(weights)


def is_model(reward: Any) -> bool:
    """Whether a reward is a directory with a model instead of a function."""
    return isinstance(reward, str | Path) and (Path(reward) / "config.json").is_file()
