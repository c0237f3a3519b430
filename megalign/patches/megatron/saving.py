"""Checkpoints written without processes that would outlive their rank."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megalign.forked import Result
from megalign.patches.megatron.replace import replace


def save_without_helper_processes() -> None:
    """dist_checkpointing/strategies/filesystem_async.py: a rank that is killed would leave its helpers behind.

    (1) :51/53 starts a manager process for the results of a save; here they come through a file without a name.
    (2) :225 forks a process for each file (0.16.1; 0.19.2 has threads there). A save in the background is in a
    process of its own already, which ends with its rank. Goes when upstream has neither.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # 0.19 calls it by a public name.
    name = "get_write_results_queue"
    name = name if hasattr(filesystem_async, name) else f"_{name}"
    replace(filesystem_async, name, lambda *args: Result())
    writer = filesystem_async.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multiproc"):
        writer.write_preloaded_data_multiproc = staticmethod(_write_in_threads)


def _write_in_threads(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Result) -> None:
    """In place of FileSystemWriterAsync.write_preloaded_data_multiproc: puts {bucket's number: what was written}, or
    the exception that stopped a bucket."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(numbered: tuple[int, Any]) -> tuple[int, Any]:
        written: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(numbered[0])
        FileSystemWriterAsync.write_preloaded_data(
            transforms, *numbered, results_queue=written, count_queue=running, use_fsync=True, use_msc=use_msc
        )
        return written.get_nowait()

    with ThreadPoolExecutor(max(1, len(buckets))) as pool:
        parts = dict(pool.map(write, enumerate(buckets)))
    failures = [part for part in parts.values() if isinstance(part, Exception)]
    results.put(failures[0] if failures else parts)
