"""Logprobs beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megalign.errors import UserError
from tools.benchmarks import logprob


def test_logprobs_beside_torchs(measured: Callable[..., Any]) -> None:
    entries, _ = measured("logprob", "--vocab", 40000, "--tokens", 64, "--hidden", 16, "--dtype", "float32")
    assert [(entry["what"], entry["engine"]) for entry in entries] == [
        (what, engine) for what in (logprob.GIVEN, logprob.HEAD) for engine in logprob.ENGINES
    ]
    given, torchs = entries[:2]
    logits = 64 * 40000 * 4
    # Torch holds log p, p and gradients of their size; the gradient written over the logits takes nothing.
    assert torchs["extra_bytes"] > 3 * logits and given["extra_bytes"] < logits / 2
    assert given["extra_share"] == given["extra_bytes"] / torchs["extra_bytes"]
    assert given["memory_share"] == pytest.approx(3 * logits / given["median_s"] / 4e9)
    assert entries[2]["mfu"] == pytest.approx(6 * 64 * 40000 * 16 / entries[2]["median_s"] / 8e9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", [logprob.GIVEN, logprob.HEAD])
def test_logprobs_that_differ_are_an_error(what: str, dtype: str) -> None:
    case = logprob.Case(what, 50, 12, 8, dtype)
    ours, torchs = (
        logprob.Answer(0.0, 0.0, 0, problem.results(problem.solve(engine)))
        for engine in logprob.ENGINES
        for problem in [logprob.Problem(case)]
    )
    logprob.check_same_results(case, ours, torchs)
    for name, values in torchs.results.items():
        for wrong in (1.1 * values, np.nan * values):
            with pytest.raises(UserError, match=f"megalign's {name} is .* of its size away"):
                logprob.check_same_results(case, ours._replace(results={**ours.results, name: wrong}), torchs)
