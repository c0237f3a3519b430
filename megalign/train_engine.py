"""TrainEngine: one model on the ranks of a layout. Policy, reference, critic and reward model are four of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megalign import device, ops
from megalign.batch import Batch, Counts, Metric, Slice
from megalign.checkpoints.find import HUGGING_FACE
from megalign.compiled import compile_passes
from megalign.conversion import hf_files
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of, exported_config, is_classifier
from megalign.conversion.hf_config import write_companions
from megalign.data.prefixes import SharedPrefixes, num_shared, shared_prefixes
from megalign.data.scored import pad_of
from megalign.errors import UserError
from megalign.model import checkpoint, extensions, optimizer, overlap
from megalign.model.activation_offload import offloaded_activations
from megalign.model.attention import PackedSequences
from megalign.model.build import HiddenStatesModel, build_model
from megalign.model.finiteness import Finiteness, SkippedStep
from megalign.model.heads import language_model_columns, score_columns
from megalign.model.layer_spec import not_in_transformer_engine, not_sharing_prefixes
from megalign.model.offload import Offload
from megalign.parallel import pipeline
from megalign.parallel.control import agree
from megalign.parallel.groups import ParallelGroups, seed_parallel_rng
from megalign.parallel.reduce import reduce_counts, reduce_metrics
from megalign.resharding import export, load
from megalign.waiting import Waiting

if TYPE_CHECKING:
    from megalign.config import LoopConfig

LossFn = Callable[[dict[str, Tensor], Batch, Counts], tuple[Tensor, dict[str, Metric]]]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step did, equal on every rank but for how long it waited."""

    loss: float
    grad_norm: float  # before clipping
    metrics: dict[str, float]
    counts: Counts
    skipped: SkippedStep | None = None  # when loss or gradient were not finite: nothing has changed
    pipeline_wait_s: float | None = None  # this rank's, for other stages and for messages from and to them


class TrainEngine:
    """A Hugging Face model as Megatron ranks hold it: forward, train_step, save, load, export, sleep, wake.

    With `score_head` it is a reward model or a critic: of a *ForSequenceClassification directory, or with a new head
    on a language model. `extras` are further columns of the language model's head (parallel.vocab.EXTRAS).
    """

    def __init__(
        self,
        model_path: str,
        args: LoopConfig,
        groups: ParallelGroups,
        *,
        trainable: bool = True,
        score_head: bool = False,
        extras: tuple[str, ...] = (),
    ) -> None:
        self.hf_path, self.groups, self._args, self._extras = model_path, groups, args, extras
        self.architecture = _architecture(model_path, score_head)
        seed_parallel_rng(args.seed)
        compile_passes(args.torch_compile)
        self._models = build_model(self.architecture, args, groups)
        load.load_hf(model_path, self._models, groups, self.architecture, seed=args.seed)
        self._chunks: list[nn.Module] = list(self._models)
        self._not_shared = not_sharing_prefixes(self._models[0].config, self.architecture)
        self.shares_prefixes = args.share_prefixes and self._not_shared is None
        self._optimizer = None
        self._sleeps = args.engines_sleep
        self._offload = Offload()
        if trainable:
            self._chunks = optimizer.wrap_for_training(self._models, args, groups)
            self._optimizer = optimizer.build_optimizer(self._chunks, args)
        else:
            for model in self._models:
                model.requires_grad_(False)

    def forward(self, batches: list[Batch], names: tuple[str, ...] = ("logprobs",)) -> list[dict[str, Tensor]]:
        """Token columns [T] float32 of each batch, without gradient, on every rank of the replica.

        Names: logprobs, entropy, argmax_correct and the extras; with a score head scores, values. They are 0 off
        the loss mask. A sequence column `temperature` divides the logits.
        """
        batches = self._placed(batches)
        columns = pipeline.evaluate(self._chunks, batches, self._stage, self._rows, self._head, self.groups)
        return [{name: column[name] for name in names} for column in columns]

    def train_step(
        self, batches: list[Batch], loss_fn: LossFn, *, learning_rate: float, counts: Counts | None = None
    ) -> StepResult:
        """One optimizer step on this data-parallel rank's microbatches.

        `loss_fn(columns, batch, counts)` returns the microbatch's share of the global loss and of each metric.
        `counts` default to the loss tokens and sequences of all ranks' batches.
        """
        assert self._optimizer is not None, "a frozen engine has no optimizer"
        counts = counts or reduce_counts(batches, self.groups)
        batches = self._placed(batches)
        finiteness, waiting = Finiteness(), Waiting()
        optimizer.zero_gradients(self._chunks, self._optimizer)
        shares = pipeline.train(
            self._chunks,
            batches,
            self._stage,
            self._rows,
            self._head,
            finiteness.watched(lambda columns, batch: loss_fn(columns, batch, counts)),
            self.groups,
            waiting,
        )
        grad_norm, changed = optimizer.step(self._optimizer, learning_rate)
        metrics = reduce_metrics(shares, self.groups)
        return StepResult(
            loss=metrics.pop("loss"),
            grad_norm=grad_norm,
            metrics=metrics,
            counts=counts,
            skipped=None if changed else finiteness.skipped(batches, self.groups),
            pipeline_wait_s=waiting.seconds() if self.groups.pp.size > 1 else None,
        )

    def eval_step(self, batches: list[Batch], loss_fn: LossFn, *, counts: Counts | None = None) -> dict[str, float]:
        """The loss and its metrics over all ranks' batches, without gradient."""
        counts = counts or reduce_counts(batches, self.groups)
        batches = self._placed(batches)
        columns = pipeline.evaluate(self._chunks, batches, self._stage, self._rows, self._head, self.groups)
        shares = []
        with torch.no_grad():
            for column, batch in zip(columns, batches, strict=True):
                loss, metrics = loss_fn(column, batch, counts)
                shares.append({"loss": Metric(loss), **metrics})
        return reduce_metrics(shares, self.groups)

    @property
    def made_of(self) -> str:
        """What computes here, and why nothing faster does, in a line for whoever started the run."""
        config = self._models[0].config
        layers = extensions.layers_name(
            config.transformer_impl, self._args.transformer_impl, not_in_transformer_engine(self.architecture)
        )
        parts = [f"layers: {layers}", f"optimizer: {extensions.optimizer_name()}"]
        if device.on_cuda() and config.bf16 and self._args.torch_compile:
            parts.append("plain passes between matrix products: compiled")
        why = ops.why_torch(device.device())
        if why is not None:
            parts.append(f"kernels: torch's (csrc/: {why})")
        if self._args.share_prefixes and self._not_shared is not None:
            parts.append(f"prefixes: each sequence computes its own (not shared with {self._not_shared})")
        return "; ".join(parts)

    def named_slices(self) -> Iterator[Slice]:
        """This rank's parts of the Hugging Face tensors, each byte of the model once over a model copy."""
        return export.named_slices(self._weights(), self.groups, self.architecture)

    def gathered(self) -> Generator[tuple[str, Tensor], None, None]:
        """Whole Hugging Face tensors on every rank of the model copy, in bounded buckets; collective."""
        return export.gathered(self._weights(), self.groups, self.architecture)

    def export(self, path: str, *, special_tokens: Mapping[str, int] | None = None) -> None:
        """Writes a Hugging Face directory; collective. `special_tokens` are the tokenizer's (`eos_token_id`, ...)."""
        tokens = special_tokens or {}
        export.save_hf(
            path,
            self.hf_path,
            self._weights(),
            self.groups,
            self.architecture,
            config_changes=self._config_changes(tokens),
            special_tokens=tokens,
        )

    def save(self, path: str, *, special_tokens: Mapping[str, int] | None = None) -> dict[str, str]:
        """Writes the training checkpoint (weights and, unless frozen, the optimizer); collective.

        Its hugging_face/ says what the model is, so that tools/megatron_to_hf.py needs no other directory. Returns the
        checksums of Megatron's files that this rank wrote.
        """
        self._weights()
        checksums = checkpoint.save(path, self._chunks, self._optimizer)
        self._describe(path, special_tokens or {})
        return checksums

    def begin_save(
        self, path: str, *, special_tokens: Mapping[str, int] | None = None, weights_only: bool = False
    ) -> checkpoint.Saving:
        """The same in the background: the engine may train, sleep or end meanwhile; collective."""
        models = self._weights()
        saving = (
            checkpoint.begin_save(path, list(models), None)
            if weights_only
            else checkpoint.begin_save(path, self._chunks, self._optimizer)
        )
        self._describe(path, special_tokens or {})
        return saving

    def _describe(self, path: str, tokens: Mapping[str, int]) -> None:
        def write() -> None:
            if self.groups.world.rank == 0:
                beside = Path(path) / HUGGING_FACE
                beside.mkdir(exist_ok=True)
                changes = self._config_changes(tokens)
                write_companions(Path(self.hf_path), beside, config_changes=changes, special_tokens=tokens)

        agree(write, self.groups.world)

    def _config_changes(self, tokens: Mapping[str, int]) -> dict[str, Any]:
        pad = pad_of(tokens, self.architecture.pad_token_id)
        return exported_config(hf_files.read_config(self.hf_path), self.architecture, pad)

    def load(self, path: str) -> None:
        """Reads what `save` wrote; collective."""
        self._weights()  # a gather that is still on its way would write over what is read
        checkpoint.load(path, self._chunks, self._optimizer)

    @torch.no_grad()
    def mix_in(self, other: TrainEngine, weight: float) -> None:
        """Every parameter p becomes weight * (other's p) + (1 - weight) * p; both awake, at one layout."""
        for mine, theirs in zip(self._weights(), other._weights(), strict=True):
            for kept, new in zip(mine.parameters(), theirs.parameters(), strict=True):
                # Rounded to bf16 once: twice moved a ninth of the weights of a reference that equals the policy.
                kept.copy_(torch.lerp(kept.float(), new.float(), weight))

    def sleep(self) -> None:
        """Parameters, gradients and optimizer state leave the device, when `vllm_enable_sleep_mode` says so."""
        if self._sleeps and not self._offload.asleep:
            self._weights()
            self._offload.sleep(self._resident_tensors())
            _prefixes_on.cache_clear()

    def wake(self, *_: str) -> None:
        """They come back bitwise. The tags that a rollout engine knows mean nothing here."""
        self._offload.wake()

    @contextmanager
    def kept_as_it_was(self) -> Iterator[None]:
        """Awake as the block begins, and after it as it was before, whatever the block did."""
        was_asleep = self._offload.asleep
        self.wake()
        yield
        if was_asleep:
            self.sleep()
        else:
            self.wake()

    def _weights(self) -> list[HiddenStatesModel]:
        """The models, with what the last step made of every weight: collective over dp with overlap_param_gather."""
        overlap.finish_gather(self._chunks)
        return self._models

    def _resident_tensors(self) -> Iterator[Tensor]:
        for model in self._models:
            yield from model.parameters()
        if self._optimizer is None:
            return
        for chunk in self._chunks:
            for buffer in chain(chunk.buffers, chunk.expert_parallel_buffers):
                yield from (data for data in (buffer.param_data, buffer.grad_data) if data is not None)
        for group in self._optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.adam_states(self._optimizer):
            yield from (value for name, value in state.items() if name != "step")

    def _placed(self, batches: list[Batch]) -> list[Batch]:
        """The batches on the device. With tensor ranks, an id past the vocabulary would silently read zeros."""
        size = self.architecture.vocab_size
        for batch in batches:  # on the host: a device would be waited for
            predicted = batch["loss_mask"][batch.cu_seqlens[:-1].long()]
            assert not predicted.any(), "a sequence's first token has no prediction"
            largest = int(batch.tokens.max())
            if largest >= size:
                raise UserError(
                    f"token {largest} is not in the vocabulary of {self.hf_path}, which has {size} entries; use models "
                    "of one tokenizer"
                )
        return [batch.to(device.device()) for batch in batches]

    def _stage(self, model: nn.Module, batch: Batch) -> Tensor:
        packed = PackedSequences.of(batch, self.groups.cp, self._prefixes(batch))
        tokens = packed.local(batch.tokens)[None]
        positions = torch.arange(tokens.numel(), device=tokens.device)[None]  # rope takes them from `packed`
        balanced = (
            {"padding_mask": self._pads(model, batch, packed)} if self._models[0].config.moe_aux_loss_coeff else {}
        )
        with self._offloaded(model) if self._args.activation_offloading else nullcontext():
            return model(tokens, positions, None, packed_seq_params=packed, **balanced)

    def _rows(self, batch: Batch) -> int:
        """Of the hidden states that `_stage` makes of a batch on this rank, known before it is run."""
        computed = batch.num_tokens
        if self.shares_prefixes:
            computed -= num_shared(batch.shared, self.groups.token_multiple)
        tensor_ranks = self.groups.tp.size if self._args.sequence_parallel else 1
        return computed // (self.groups.cp.size * tensor_ranks)

    def _prefixes(self, batch: Batch) -> SharedPrefixes | None:
        """What of the batch is computed once for several sequences, where the attention allows it."""
        if not self.shares_prefixes:
            return None
        lengths, multiple = batch.host_lengths.whole, self.groups.token_multiple
        return _prefixes_on(batch.tokens.device, batch.shared, lengths, multiple)

    def _pads(self, model: nn.Module, batch: Batch, packed: PackedSequences) -> Tensor:
        """[1, tokens] what a router must not count of the tokens that this chunk of the model sees."""
        pads, chunk, tp = packed.local(batch.is_padding)[None], self._models[self._chunks.index(model)], self.groups.tp
        # Megatron scatters it over tensor ranks with the embedding, and only there.
        scattered = chunk.config.sequence_parallel and not chunk.pre_process
        return pads.chunk(tp.size, dim=1)[tp.rank] if scattered else pads

    def _offloaded(self, model: nn.Module) -> AbstractContextManager[None]:
        """For a stage's forward pass; the schedule keeps its input, from the stage before, itself."""
        unwrapped = self._models[self._chunks.index(model)]
        arrived = unwrapped.decoder.input_tensor
        return offloaded_activations(unwrapped, [] if arrived is None else [arrived])

    def _head(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        # The head is no module that is called, so nothing has waited for its weight yet.
        overlap.finish_gather(self._chunks[-1:])
        model, shape, prefixes = self._models[-1], self.architecture, self._prefixes(batch)
        if shape.num_labels is not None:
            return score_columns(model, hidden, batch, self.groups, prefixes)
        return language_model_columns(
            model, hidden, batch, self.groups, shape.vocab_size, self._extras, shape.logit_softcap, prefixes
        )


def _architecture(model_path: str, score_head: bool) -> Architecture:
    config = hf_files.read_config(model_path)
    if score_head:
        return architecture_of(config).with_score_head()
    if is_classifier(config):
        raise UserError(
            f"{model_path} is a {config['architectures'][0]}, which has no language model head; give a causal "
            "language model, or use it as a reward model"
        )
    return architecture_of(config)


@lru_cache(maxsize=16)  # every chunk of the stage and the head ask for a microbatch's
def _prefixes_on(
    where: torch.device, shared: tuple[int, ...], lengths: tuple[int, ...], multiple: int
) -> SharedPrefixes | None:
    found = shared_prefixes(shared, lengths, multiple)
    return found and replace(found, kept=found.kept.to(where), source=found.source.to(where))
