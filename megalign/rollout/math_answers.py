"""math-verify in a process of its own, which can be ended: `MathAnswers.judge`, and the process's main below.

math-verify's own time limits are signals, which only a main thread gets, and sympy can compute for hours over
an answer such as 9^(9^(9^9)) without ever looking at a signal.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from typing import IO, Any, NamedTuple

from megalign.errors import UserError

_SECONDS_TO_START = 120.0
_SECONDS_AN_ANSWER = 30.0  # math-verify's own limits, 10 + 10 + 5 s, come first where signals work


class Verdict(NamedTuple):
    """How one answer was judged; `gold` and `answer` are for people."""

    reward: float | None
    gold: str
    answer: str


class MathAnswers:
    """Judges answers one by one in a subprocess, started at the first use and again where it is lost."""

    def __init__(self, seconds_an_answer: float = _SECONDS_AN_ANSWER) -> None:
        self._seconds = seconds_an_answer
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # two reward functions may run at once

    def judge(self, pairs: list[tuple[str | None, str]]) -> list[Verdict]:
        """A verdict for each (answer, gold): reward 1, 0, or None where the gold cannot be parsed."""
        with self._lock:
            return [self._judge(answer, gold) for answer, gold in pairs]

    def _judge(self, answer: str | None, gold: str) -> Verdict:
        if answer is None:
            return Verdict(0.0, "[incomplete reasoning]", "[incomplete reasoning]")
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([answer, gold]) + "\n")
            process.stdin.flush()
            line = _read_line(process.stdout, self._seconds)
        except BrokenPipeError:
            line = ""
        if not line:  # too slow, or sympy ran out of memory: no answer that a reader could check either
            self._end()
            return Verdict(0.0, gold, "[no verdict in time]")
        return Verdict(*json.loads(line))

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # killed between two answers, say by the kernel for its memory
        if self._process is None:
            atexit.register(self._end)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megalign.rollout.math_answers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            assert self._process.stdout is not None
            greeting = _read_line(self._process.stdout, _SECONDS_TO_START).strip()
            if greeting != "ready":
                self._end()
                raise UserError(
                    f"accuracy rewards need math-verify, which does not start ({greeting or 'no answer'}); "
                    "pip install math-verify"
                )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _read_line(stream: IO[str], seconds: float) -> str:
    """One line, or "" when none came in time; a line is written whole, so its first byte is enough."""
    poll = select.poll()  # select() takes no file beyond the 1,024th, and a rank has many sockets
    poll.register(stream, select.POLLIN)
    return stream.readline() if poll.poll(seconds * 1000) else ""


def _serve() -> None:
    """The subprocess: a line [answer, gold] in, a line [reward, gold, answer] out."""
    talk = os.fdopen(os.dup(1), "w")  # whatever the libraries print must not be taken for a verdict
    os.dup2(2, 1)
    try:
        judge = _judge_with_math_verify()
    except ImportError as error:
        talk.write(f"{error}\n")
        return
    talk.write("ready\n")
    talk.flush()
    for line in sys.stdin:
        talk.write(json.dumps(judge(*json.loads(line))) + "\n")
        talk.flush()


def _judge_with_math_verify() -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # An answer must be LaTeX, in \boxed first; a gold may be a bare number too.
    extraction = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )

    def judge(answer: str, gold: str) -> Verdict:
        gold_parsed = parse(gold, parsing_timeout=10)
        if not gold_parsed:
            return Verdict(None, "[unparseable]", "[skipped]")
        parsed = parse(answer, extraction_config=[extraction], extraction_mode="first_match", parsing_timeout=10)
        equal = verify(gold_parsed, parsed, timeout_seconds=5)
        return Verdict(float(equal), str(gold_parsed), str(parsed) if parsed else "[unparseable]")

    return judge


if __name__ == "__main__":
    _serve()
