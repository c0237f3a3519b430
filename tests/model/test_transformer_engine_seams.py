"""The layers that Megatron makes of Transformer Engine's modules hold our weights, rotation and router; on a stand-in.

It shows that names and arguments fit, at one rank, and not that Transformer Engine computes right: that needs a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.start import run
from tests.tiny import save_tiny_model

SCRIPT = """
import sys
import megalign.patches.megatron as patches
patches.install()
from megatron.core.extensions import transformer_engine
assert transformer_engine.HAVE_TE
from megatron.core.transformer.moe import moe_utils
moe_utils.te_general_gemm = None  # the stand-in has none
from megalign.model import layer_spec
layer_spec.has_transformer_engine = lambda: True  # as on a GPU
from tests.layouts import ONE_RANK, make_engine
from tests.parity import MICROBATCHES, engine_logprobs, reference_logprobs
found, wanted = engine_logprobs(sys.argv[1], ONE_RANK, MICROBATCHES), reference_logprobs(sys.argv[1])
attention = make_engine(sys.argv[1], ONE_RANK)._models[0].decoder.layers[-1].self_attention.core_attention
print("attention", type(attention).__name__)
print("worst", max(float((found[i] - wanted[i]).abs().max()) for i in wanted))
"""


@pytest.mark.parametrize(
    ("family", "changes", "attention"),
    [
        ("llama", {}, "RotatedAttention"),
        ("qwen3", {}, "RotatedAttention"),
        ("mixtral", {}, "RotatedAttention"),
        ("deepseek_v2", {"rms_norm_eps": 1e-6, "q_lora_rank": 14}, "TEDotProductAttention"),
    ],
)
def test_logprobs_equal_transformers(tmp_path: Path, family: str, changes: dict[str, Any], attention: str) -> None:
    path = save_tiny_model(family, tmp_path / "model", **changes)
    root = Path(__file__).parents[2]
    places = os.pathsep.join([str(root / "tests" / "stand_ins"), str(root)])
    told = run([sys.executable, "-c", SCRIPT, path], cwd=tmp_path, PYTHONPATH=places).succeeded().stdout
    found = dict(line.split() for line in told.splitlines() if line.startswith(("attention ", "worst ")))
    assert found["attention"] == attention
    assert float(found["worst"]) < 1e-4
