"""What Megatron-Core 0.16-0.19 needs to run on CPU and gloo and without Transformer Engine; repairs of its checkpoints.

A file a subject; none imports Megatron as it is imported itself. Upstream lines are named as 0.16.1's / 0.19.2's; a
patch that only one of them needs says so.

`install()` once a process: without a GPU it replaces torch.cuda's functions for good. `megatron_calls()` goes
around every call into Megatron (schedules, optimizer, model construction): its look at every torch call is paid
there only, not by vLLM in the same process. Importing this package silences Megatron's known warnings, some of which
come while it is imported: the packages that import Megatron (parallel, model) import this one first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megalign.device import on_cuda
from megalign.patches.megatron import absent_te, cpu, gradients, optimizer_checkpoints, quiet, saving, uneven_parts
from megalign.patches.unpickling import unpickle_data_only

_installed = False

quiet.silence_known()
if not on_cuda():
    cpu.import_without_compiler()


def install() -> None:
    """Applies the patches; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    optimizer_checkpoints.repair_optimizer_checkpoints()
    optimizer_checkpoints.number_parameters_of_two_dtypes()
    saving.save_without_helper_processes()
    unpickle_data_only()
    absent_te.recompute_without_transformer_engine()
    absent_te.do_without_transformer_engine()
    gradients.add_gradients_without_apex()
    if not on_cuda():
        cpu.replace_cuda_functions()
        cpu.replace_rng_tracker_state()
        uneven_parts.send_uneven_parts_over_gloo()
        quiet.silence_known_on_a_cpu()


@contextlib.contextmanager
def megatron_calls() -> Iterator[None]:
    """Redirects Megatron's device="cuda" literals to the CPU when there is no GPU."""
    if on_cuda():
        yield
        return
    with cpu.CudaLiteralsMeanCpu():
        yield
