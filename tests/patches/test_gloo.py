"""All gloo groups of a process on one polling thread."""

from __future__ import annotations

import gc
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sums_of_groups() -> tuple[list[float], int]:
    groups = [dist.new_group([0, 1]) for _ in range(4)]
    values = [torch.tensor([float(number + dist.get_rank())]) for number in range(4)]
    works = [dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, groups, strict=True)]
    for work in reversed(works):  # of several groups at once
        work.wait()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    for group in groups:
        dist.destroy_process_group(group)
    return [float(value) for value in values], names.count("gloo_tcp_loop")


def _timeout_is_set() -> None:
    group = dist.new_group([0, 1])
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77), group)
    backend = group._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=77)
    dist.destroy_process_group(group)


def test_they_are_gloo_groups_to_torch() -> None:
    run_ranks(2, _timeout_is_set)


def test_groups_share_a_thread_and_nothing_else() -> None:
    for sums, threads in run_ranks(2, _sums_of_groups):
        assert sums == [1.0, 3.0, 5.0, 7.0]
        assert threads == 1
