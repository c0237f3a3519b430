"""All gloo groups of a process on one polling thread, and a process whose last act is a collective."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.jobs.start import run
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


# Linked before the C++ library: a thread of gloo's is held up where it has told for the second time, which is heard by
# who waits, that a collective is done; until the interpreter is about to end, or for so many seconds.
HOLD_UP = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

volatile int hold_up = 0;

static int told = 0;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

void _ZNSt18condition_variable10notify_allEv(void *self) {
  char name[32] = "";
  ((void (*)(void *))dlsym(RTLD_NEXT, "_ZNSt18condition_variable10notify_allEv"))(self);
  pthread_getname_np(pthread_self(), name, sizeof name);
  if (strcmp(name, "pt_gloo_runloop") != 0 || !hold_up || ++told != 2) return;
  for (double end = now() + hold_up; now() < end && hold_up;) {}
}
"""
LAST_ACT = """
import atexit, ctypes, sys, time
import torch, torch.distributed as dist
from megalign import launch

class Late:  # the interpreter lets go of itself while it ends
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

hold_up = ctypes.c_int.in_dll(ctypes.CDLL(None), "hold_up")

@atexit.register
def about_to_end():  # the last to be called; keeps the interpreter to itself
    sys.setswitchinterval(10)
    hold_up.value = 0
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass

launch.prepare_environment()
launch.join("gloo")
seconds = 1
if sys.argv[1:] == ["unguarded"]:
    from megalign.patches import gloo
    atexit.unregister(gloo._await_threads)
    seconds = 60
late, values = Late(), torch.zeros(1)
hold_up.value = seconds
dist.all_reduce(values)
print("reduced", flush=True)
"""


def test_a_collective_may_be_a_processs_last_act(tmp_path: Path) -> None:
    source, library = tmp_path / "hold_up.c", tmp_path / "hold_up.so"
    source.write_text(HOLD_UP)
    libraries = ["-Wl,--no-as-needed", "-lstdc++", "-ldl"]
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), *libraries], check=True)
    ended = [
        run([sys.executable, "-c", LAST_ACT, *words], tmp_path, LD_PRELOAD=str(library))
        for words in ([], ["unguarded"])
    ]
    assert [one.stdout for one in ended] == ["reduced\n", "reduced\n"], [one.stderr for one in ended]
    assert ended[0].status == 0, ended[0].stderr
    # What it is about, and whether the thread was held up at all; once torch has mended it, all of this can go.
    assert ended[1].status == -6, ended[1].stderr
    assert "terminate called without an active exception" in ended[1].stderr
