"""The conversion tools as users call them: alone, under torchrun, killed, and beside transformers and Megatron."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megalign.checkpoints.convert import hf_to_megatron
from megalign.trainers.manifest import write_manifest
from tests.checkpoints.models import bits_of
from tests.jobs.inputs import save_model
from tests.jobs.start import ROOT
from tests.ranks import run_ranks
from tests.tiny import save_tiny_classifier, save_tiny_model
from tools import check_conversion, inspect_checkpoint
from tools.benchmarks.convert import Run as Measured
from tools.benchmarks.convert import config_of, make_model, summarize, watch
from tools.benchmarks.machine import status_bytes

TOOLS = ("hf_to_megatron", "megatron_to_hf", "check_conversion", "inspect_checkpoint")
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}


def tool(name: str, *words: object, ranks: int = 1) -> list[str]:
    """A tool's command, under torchrun where it has several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *torchrun, str(ROOT / f"tools/{name}.py"), *map(str, words)]


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", TOOLS)
def test_help_is_there_before_torch_is(name: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["tool", "--help"]
try:
    runpy.run_path({str(ROOT / f"tools/{name}.py")!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    told = ended([sys.executable, "-c", code])
    assert told.returncode == 0 and f"{name}.py" in told.stdout, told.stderr


def test_two_ranks_convert_a_share_each(tmp_path: Path) -> None:
    model = save_tiny_model("mixtral", tmp_path / "model")
    there = ended(tool("hf_to_megatron", "--hf", model, "--output", tmp_path / "megatron", ranks=2))
    assert there.returncode == 0, there.stderr
    files = sorted(tmp_path.glob("megatron/*.distcp"))
    assert [file.name for file in files] == ["__0_0.distcp", "__1_0.distcp"]
    assert max(file.stat().st_size for file in files) < 2 * min(file.stat().st_size for file in files)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "megatron").rename(tmp_path / "checkpoint-1" / "engine")  # as in a run, with checksums
    write_manifest(tmp_path / "checkpoint-1", {"step": 1, "settings": {}, "layout": {}}, {})
    words = ("--checkpoint", tmp_path / "checkpoint-1", "--output", tmp_path / "back", "--max-shard-size", "100KB")
    back = ended(tool("megatron_to_hf", *words, ranks=2))
    assert back.returncode == 0, back.stderr
    assert bits_of(tmp_path / "back") == bits_of(model)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    told = ended(tool("megatron_to_hf", "--checkpoint", tmp_path / "none", "--output", tmp_path / "out"))
    lines = told.stderr.strip().splitlines()
    assert told.returncode == 2 and len(lines) == 1, told.stderr
    assert lines[0].startswith("megalign: error: checkpoint directory") and "does not exist" in lines[0]


# A tool that comes no further than to the first of the bytes that it copies.
HELD = """
import os, runpy, sys, time
send, sent = os.sendfile, []

def send_once(*given):
    if sent:
        time.sleep(600)
    sent.append(send(*given))
    return sent[0]

os.sendfile = send_once
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", config_of(12, 512, 2048, 8, 4, 4000), max_shard_size=20 * 10**6)
    there = tool("hf_to_megatron", "--hf", tmp_path / "model", "--output", tmp_path / "megatron")
    command = there
    if name == "megatron_to_hf":
        assert ended(there).returncode == 0
        words = ("--checkpoint", tmp_path / "megatron", "--output", tmp_path / "back", "--max-shard-size", "10MB")
        command = tool(name, *words)
    target = Path(command[command.index("--output") + 1])
    held = [sys.executable, "-c", HELD, *command[1:]]
    process = subprocess.Popen(held, env=ENVIRON, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = target.parent / f".{target.name}.partial"
    end = time.monotonic() + 60
    try:
        while not any(file.stat().st_size for file in partial.glob("*[0-9]*") if file.is_file()):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not target.exists() and partial.exists()
    assert not (partial / "metadata.json").exists() and not list(partial.glob("model*"))
    assert ended(command).returncode == 0  # the same command begins anew
    assert target.exists() and not partial.exists()


def exit_status(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        check_conversion.main([str(word) for word in words])
    return int(left.value.code)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_check_passes_what_is_one_model(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    hf_to_megatron(Path(model), tmp_path / "megatron")
    words = ("--hf", model, "--checkpoint", tmp_path / "megatron", "--tolerance")
    assert run_ranks(1, exit_status, *words, 1e-4) == [0]
    # Logits of two libraries are not bitwise the same: it is they that fail here.
    assert run_ranks(1, exit_status, *words, 0.0) == [1]


def score_difference(model: str, checkpoint: Path) -> float:
    return check_conversion.logit_difference(Path(model), checkpoint, "A reward model.")


def test_the_check_compares_a_reward_models_scores(tmp_path: Path) -> None:
    model, other = (save_tiny_classifier("gemma2", tmp_path / f"model{seed}", seed=seed) for seed in (0, 1))
    hf_to_megatron(Path(model), tmp_path / "megatron")
    assert run_ranks(1, exit_status, "--hf", model, "--checkpoint", tmp_path / "megatron") == [0]
    (far,) = run_ranks(1, score_difference, other, tmp_path / "megatron")
    assert far > 0.1


def test_the_check_fails_a_tensor_past_the_tolerance(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    hf_to_megatron(Path(model), tmp_path / "megatron")
    tensors = load_file(f"{model}/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 3] += 0.01
    save_file(tensors, f"{model}/model.safetensors", metadata={"format": "pt"})
    words = ("--hf", model, "--checkpoint", tmp_path / "megatron", "--no-logits", "--tolerance")
    assert exit_status(*words, 0.001) == 1
    assert f"{name}: 0.01" in capfd.readouterr().out
    assert exit_status(*words, 0.02) == 0
    tensors[name][3, 3] = torch.nan
    save_file(tensors, f"{model}/model.safetensors", metadata={"format": "pt"})
    assert exit_status(*words, 0.02) == 1


def test_inspect_tells_step_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model("qwen2", tmp_path / "model")
    hf_to_megatron(Path(model), tmp_path / "megatron")
    inspect_checkpoint.main([str(tmp_path / "megatron")])
    told = capsys.readouterr().out
    assert "step 0, Qwen2ForCausalLM" in told
    line = next(line for line in told.splitlines() if "linear_fc1.weight" in line)
    assert line.split() == ["decoder.layers.mlp.linear_fc1.weight", "float32", *["[4,", "96,", "32]"], "8", "chunks"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """0.47 GB and 0.81 GB: 12 and 24 layers of 14 M weights, one vocabulary. Whole in memory, with the 0.2 GB that a
    process begins with, they would be 1.5 times apart."""
    peaks = {}
    for layers in (12, 24):
        model, megatron = tmp_path / f"model{layers}", tmp_path / f"megatron{layers}"
        make_model(model, config_of(layers, 1024, 3584, 16, 8, 32000))
        timed = "import atexit; atexit.register(lambda: print('\\n0 0'))\nimport runpy, sys; sys.argv = sys.argv[1:]\n"
        child = [sys.executable, "-c", timed + "runpy.run_path(sys.argv[0], run_name='__main__')"]
        there = watch([*child, *tool("hf_to_megatron", "--hf", model, "--output", megatron)[1:]])
        back = watch(
            [*child, *tool("megatron_to_hf", "--checkpoint", megatron, "--output", tmp_path / f"back{layers}")[1:]]
        )
        peaks[layers] = there.peak_anon, back.peak_anon
    for small, large in zip(peaks[12], peaks[24], strict=True):
        assert 50e6 < small < large * 1.3 and large < 1.3 * small, peaks
    assert bits_of(tmp_path / "back24") == bits_of(tmp_path / "model24")


def test_the_benchmarks_ratio_is_of_the_copy_beside_it() -> None:
    found = {
        "copy": [Measured(1.0, 0.5, 10), Measured(4.0, 0.5, 20)],
        "hf_to_megatron": [Measured(2.0, 1.0, 300), Measured(5.0, 1.0, 200)],
        "megatron_to_hf": [Measured(1.0, 2.0, 1), Measured(1.0, 2.0, 1)],
    }
    there = summarize(found, 7 * 10**9, "1b")[1]
    assert there["ratio"] == pytest.approx((1 / 2 + 4 / 5) / 2) and there["cpu_ratio"] == 0.5
    assert there["gb_per_s"] == 2.0 and there["peak_anon"] == 300
    assert status_bytes(os.getpid(), "RssAnon") > 10e6


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    words: tuple[object, ...] = ("--hf", model)
    if name == "megatron_to_hf":
        hf_to_megatron(Path(model), tmp_path / "megatron")
        words = ("--checkpoint", tmp_path / "megatron")
    command = tool(name, *words, "--output", tmp_path / "out")
    # A write beyond it fails, as on a full disk.
    limit = "import resource, os; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2); "
    limited = f"{limit}os.execv({command[0]!r}, {command!r})"
    told = ended([sys.executable, "-c", limited])
    assert told.returncode == 2 and "megalign: error: cannot write" in told.stderr, told.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "megatron"}
