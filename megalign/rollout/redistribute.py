"""From vLLM's replicas (runs of consecutive ranks) to every rank; Megatron's data ranks are other sets."""

from __future__ import annotations

import torch.distributed as dist

from megalign.batch import Completion
from megalign.parallel.groups import ParallelGroups
from megalign.rollout.engine import RolloutEngine


def redistribute(completions: list[Completion], rollout: RolloutEngine, groups: ParallelGroups) -> list[Completion]:
    """All completions of the job on every rank, in the order of the prompts.

    One broadcast for each replica, from its first rank: an all-gather of objects would pad every rank's part
    to the largest, and only one rank in each replica has anything to say.
    """
    if rollout.num_replicas == 1:
        return completions
    replica_size = groups.world.size // rollout.num_replicas
    everyone: list[Completion] = []
    for replica in range(rollout.num_replicas):
        first = replica * replica_size
        parcel = [completions if groups.world.rank == first else None]
        dist.broadcast_object_list(parcel, src=groups.world.ranks[first], group=groups.world.group)
        part = parcel[0]
        assert part is not None, f"rank {first} sent nothing"
        everyone.extend(part)
    indices = [completion.index for completion in everyone]
    assert indices == list(range(len(everyone))), "the replicas' shares do not make up the list of prompts"
    return everyone
