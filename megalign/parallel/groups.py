"""The process groups of a layout; the sole importer of Megatron's parallel_state."""

from __future__ import annotations

import datetime
import gc
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megalign import device, failure, launch, liveness
from megalign.errors import UserError
from megalign.patches import gloo
from megalign.patches import megatron as megatron_patches

if TYPE_CHECKING:
    from megalign.config import ParallelConfig


@dataclass(frozen=True)
class Axis:
    """One parallel axis as this rank sees it."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int  # this rank's place in the group
    size: int
    ranks: list[int]  # global ranks of the group, in order


@dataclass(frozen=True)
class ParallelGroups:
    """All axes of the layout. World order is Megatron's: tp fastest, then cp, dp, pp; of experts etp, ep, pp."""

    world: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    ep: Axis  # who shares a layer's experts
    etp: Axis  # who shares an expert's matrices
    copy: Axis  # ranks that together hold the whole model, experts included, as few as there can be
    token_unit: int = 1  # a multiple of it is what each rank computes on: FP8 products need it

    @property
    def is_dp_leader(self) -> bool:
        """One rank for each data-parallel replica: who scores rewards and speaks for the replica."""
        return self.tp.rank == self.pp.rank == self.cp.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so the loss."""
        return self.pp.rank == self.pp.size - 1

    @property
    def experts_span_replicas(self) -> bool:
        """Whether ranks of several data-parallel replicas share experts: they then run microbatches together."""
        return self.tp.size * self.cp.size % (self.ep.size * self.etp.size) != 0

    @property
    def token_multiple(self) -> int:
        """T of every Batch is a multiple of this: sequence parallelism and zigzag CP split it evenly, into units."""
        return self.tp.size * math.lcm(self.sequence_multiple, self.cp.size * self.token_unit)

    @property
    def sequence_multiple(self) -> int:
        """The length of every sequence is a multiple of this: zigzag CP cuts each into 2 * cp equal pieces."""
        return 2 * self.cp.size if self.cp.size > 1 else 1


_Layout = tuple[int, ...]  # tp, pp, virtual pp, cp, ep, etp
_made: tuple[_Layout, ParallelGroups, list[Any]] | None = None  # and the process groups behind them


def initialize(args: ParallelConfig, *, timeout_s: float = 1800) -> ParallelGroups:
    """Starts torch.distributed if nobody has, then Megatron's groups for the layout in `args`.

    The same layout again gives the same groups: each set costs dozens of connections and threads.
    """
    return replace(_initialize(args, timeout_s), token_unit=args.token_unit)


def _initialize(args: ParallelConfig, timeout_s: float) -> ParallelGroups:
    global _made
    megatron_patches.install()
    start_distributed(timeout_s)
    args.validate_layout(dist.get_world_size())
    layout = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.num_chunks,
        args.context_parallel_size,
        args.expert_model_parallel_size,
        args.expert_tensor_size,
    )
    if _made is not None and _made[1].world.group is not dist.group.WORLD:
        _destroy(_made[2])  # the job's groups were ended, Megatron's with them, and it does not know
        _made = None
    if _made is not None and _made[0] == layout:
        _set_timeout([dist.group.WORLD, *_made[2]], timeout_s)
        return _made[1]
    if _made is not None:
        _destroy(_made[2])
        _made = None
    before = set(_process_groups())
    groups = _make(layout, timeout_s)
    _set_timeout([dist.group.WORLD], timeout_s)  # somebody else may have started it
    _made = (layout, groups, [group for group in _process_groups() if group not in before])
    return groups


def _make(layout: _Layout, timeout_s: float) -> ParallelGroups:
    from megatron.core import parallel_state as mpu

    tp, pp, chunks, cp, ep, etp = layout
    with megatron_patches.megatron_calls():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
    return ParallelGroups(
        world=_axis(dist.group.WORLD),
        tp=_axis(mpu.get_tensor_model_parallel_group()),
        pp=_axis(mpu.get_pipeline_model_parallel_group()),
        cp=_axis(mpu.get_context_parallel_group()),
        dp=_axis(mpu.get_data_parallel_group()),
        ep=_axis(mpu.get_expert_model_parallel_group()),
        etp=_axis(mpu.get_expert_tensor_parallel_group()),
        copy=_axis(_copy_group(math.lcm(tp, ep * etp), pp, timeout_s)),
    )


def _copy_group(block: int, pp: int, timeout_s: float) -> Any:
    """Of each pipeline stage the same `block` neighbours: whole tensor-parallel groups and whole sets of experts."""
    stage = dist.get_world_size() // pp
    mine = None
    for first in range(0, stage, block):
        ranks = [first + number * stage + place for number in range(pp) for place in range(block)]
        group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout_s))  # all ranks make all groups
        if dist.get_rank() in ranks:
            mine = group
    return mine


def _set_timeout(groups: list[Any], timeout_s: float) -> None:
    # torch has no public way, and a group keeps what it was made with: another trainer's ddp_timeout.
    alive = _process_groups()
    for group in groups:
        if group in alive:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def _process_groups() -> list[Any]:
    # torch has no public list of groups, and Megatron keeps its own in some forty module globals.
    return list(dist.distributed_c10d._world.pg_map)


def _destroy(made: list[Any]) -> None:
    """Megatron forgets most of its groups without ending them; their sockets and threads would stay.

    So they would where an old engine, which is full of cycles, still refers to them: gloo's threads then spin on the
    sockets that the other ranks have closed.
    """
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    alive = _process_groups()
    for group in made:
        if group in alive:
            dist.destroy_process_group(group)
    made.clear()
    gc.collect()


def start_distributed(timeout_s: float) -> None:
    """Joins the job that torchrun or Slurm describes in the environment; alone, makes a job of one rank."""
    if dist.is_initialized():
        launch.keep_order(dist.get_world_size())
        gloo.await_at_exit()
        device.select_device()
        if "cpu" not in dist.get_backend_config():
            raise UserError(
                f"torch.distributed was started with backend {dist.get_backend()!r}, which cannot carry CPU tensors; "
                f"start it with {device.backend()!r}, or leave it to megalign"
            )
        liveness.start(dist.get_rank(), dist.get_world_size())
    else:
        world = launch.prepare_environment()
        device.select_device()
        liveness.start(int(os.environ["RANK"]), world)
        gloo.share_device()
        launch.join(device.backend(), timeout_s)
    liveness.join(failure.default_store())


def end_distributed() -> None:
    """Leaves the job, as the last thing that a process does."""
    liveness.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_parallel_rng(seed: int) -> None:
    """Seeds torch and Megatron's tracker: equal over dp, different over tp and pp where Megatron wants it."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    with megatron_patches.megatron_calls():
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _axis(group: Any) -> Axis:
    return Axis(
        group=group,
        rank=dist.get_rank(group),
        size=dist.get_world_size(group),
        ranks=dist.get_process_group_ranks(group),
    )
