"""The sbatch scripts, run to the end with stand-ins for srun and scontrol and the sizes of a tiny model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.start import ROOT, Ended, end_with_children, environment, run, signalled_before
from tests.trainers.runs import metric_lines

SCRIPTS = sorted(path.name for path in (ROOT / "examples/slurm").glob("*.sbatch"))

# srun: the command once a node, side by side; it fails when one of them does.
SRUN = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
jobs=()
trap 'kill -USR1 "${jobs[@]}"' USR1
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 \
        "$@" & jobs+=($!)
done
status=0
for job in "${jobs[@]}"; do
    while kill -0 "$job" 2>/dev/null; do wait "$job"; done
    wait "$job" || status=$?
done
exit $status
"""
SCONTROL = r"""#!/usr/bin/env bash
[[ "$1" == requeue ]] && { echo "requeued $2"; exit; }
[[ "$*" == "show hostnames node[01-02]" ]] || { echo "scontrol $*" >&2; exit 1; }
printf '127.0.0.1\nelsewhere\n'
"""


def start(script: str, tmp_path: Path, *, nodes: int, ranks_per_node: int, fields: dict[str, Any]) -> Ended:
    return run(*command(script, tmp_path, fields), timeout=200, **job(tmp_path, nodes, ranks_per_node))


def command(script: str, tmp_path: Path, fields: dict[str, Any]) -> tuple[list[str], Path]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["bash", str(ROOT / "examples/slurm" / script), *words], tmp_path


def job(tmp_path: Path, nodes: int, ranks_per_node: int) -> dict[str, str]:
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),  # of which the script makes a port that no socket is given unasked
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(ranks_per_node),
    }


@pytest.mark.slow
def test_8b_sft_runs_on_one_node_stops_before_its_time_is_up_and_goes_on(tmp_path: Path) -> None:
    fields = {
        "model_name_or_path": save_model(tmp_path / "model"),
        "dataset_name": write_rows(tmp_path / "rows.jsonl", sums(16)),
        "output_dir": tmp_path / "out",
        "tensor_model_parallel_size": 2,
        "bf16": False,
        "max_length": 32,
        "gradient_accumulation_steps": 1,
    }
    environ = job(tmp_path, 1, 2)
    words, cwd = command("sft_8b.sbatch", tmp_path, {**fields, "max_steps": 100_000})
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(words, cwd=cwd, env=environment(**environ), stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 150
        while len(ranks_of(first)) < 2:
            assert time.monotonic() < end and first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGUSR1)  # as Slurm does: to the script alone, and perhaps before the ranks train
        assert first.wait(100) == 0, (tmp_path / "log").read_text()
    finally:
        end_with_children(first)
    stopped = metric_lines(tmp_path / "out")[-1]
    assert stopped["stopped"] == "SIGUSR1"
    assert f"requeued {environ['SLURM_JOB_ID']}" in (tmp_path / "log").read_text()
    last = stopped["step"] + 2
    start("sft_8b.sbatch", tmp_path, nodes=1, ranks_per_node=2, fields={**fields, "max_steps": last}).succeeded()
    steps = [line["step"] for line in metric_lines(tmp_path / "out") if "loss" in line]
    assert steps == list(range(1, last + 1))
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.vllm
def test_70b_grpo_runs_over_two_nodes(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "solution": rf"$\boxed{{{row['answer']}}}$"} for row in sums(8)]
    fields = {
        "model_name_or_path": save_model(tmp_path / "model", head_dim=32),
        "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
        "output_dir": tmp_path / "out",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "vllm_tensor_parallel_size": 2,
        "vllm_cpu_kv_cache_gib": 0.1,
        "bf16": False,
        "vllm_max_model_length": 64,
        "max_completion_length": 8,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
    }
    start("grpo_70b.sbatch", tmp_path, nodes=2, ranks_per_node=2, fields=fields).succeeded()
    steps = metric_lines(tmp_path / "out")
    assert [line["step"] for line in steps] == [1, 2]
    assert all("rewards/accuracy_reward/mean" in line for line in steps)
    assert (tmp_path / "out" / "model.safetensors").exists()


def ranks_of(script: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What its torchrun has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(script.pid).children(recursive=True)
        return [process for process in below if "torchrun" in "".join(process.parent().cmdline())]
    return []


# A torchrun whose ranks hear the signal only after a while, and note what it would have done to them before.
TORCHRUN = f"""#!{sys.executable}
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "rank.py", number]) for number in ("5", "6")]
sys.exit(10 * ranks[0].wait() + ranks[1].wait())
"""
RANK = """
import signal, sys, time
from pathlib import Path
Path("rank" + sys.argv[1]).write_text(signal.getsignal(signal.SIGUSR1).name)
time.sleep(0.5)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(int(sys.argv[1])))
time.sleep(60)
"""


WAITS = "#!/bin/sh\nexec sleep 60\n"


def stand_in(tmp_path: Path, torchrun: str) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    path = tmp_path / ".venv" / "bin" / "torchrun"
    path.parent.mkdir(parents=True)
    path.write_text(torchrun)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("sent", "torchrun", "status"), [("USR1", TORCHRUN, 56), ("TERM", WAITS, 143)], ids=["USR1", "TERM"]
)
def test_a_signal_that_comes_before_the_agent_has_a_name_is_handed_on(
    sent: str, torchrun: str, status: int, tmp_path: Path
) -> None:
    stand_in(tmp_path, torchrun)
    environ = environment(**signalled_before("agent=$!", sent, tmp_path))
    node = subprocess.Popen(["bash", str(ROOT / "examples/slurm/one_node.sh")], cwd=tmp_path, env=environ)
    try:
        assert node.wait(50) == status
    finally:
        end_with_children(node)


def test_a_nodes_ranks_hear_a_signal_that_came_before_they_listened(tmp_path: Path) -> None:
    stand_in(tmp_path, TORCHRUN)
    notes = [tmp_path / f"rank{number}" for number in (5, 6)]
    node = subprocess.Popen(["bash", str(ROOT / "examples/slurm/one_node.sh")], cwd=tmp_path)
    try:
        end = time.monotonic() + 20
        while not all(note.exists() for note in notes):
            assert time.monotonic() < end and node.poll() is None
            time.sleep(0.01)
        node.send_signal(signal.SIGUSR1)
        assert node.wait(20) == 56
    finally:
        end_with_children(node)
    assert [note.read_text() for note in notes] == ["SIG_IGN", "SIG_IGN"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_outside_of_slurm_says_how_to_start_it(script: str, tmp_path: Path) -> None:
    ended = run(["bash", str(ROOT / "examples/slurm" / script)], tmp_path)
    assert ended.status != 0
    assert "start it with sbatch" in ended.stderr
