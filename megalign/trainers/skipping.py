"""Steps that changed no weight because their loss or gradient was not finite: counted, told of, and not without end."""

from __future__ import annotations

from collections.abc import Callable

from megalign.errors import UserError
from megalign.train_engine import StepResult

_SHOWN = 32  # row numbers in a line


class Skips:
    """Of one run, equal on every rank; the critic's steps are counted beside the policy's."""

    def __init__(self, limit: int, note: Callable[[str], None]) -> None:
        self._limit, self._note = limit, note
        self.total = 0  # of the whole run, also of the part before it was resumed
        self._in_a_row: dict[str, int] = {}  # by model
        self._last = ""

    def count(self, result: StepResult, step: int, *, model: str = "policy") -> None:
        """Takes notice of a step of the model, skipped or not."""
        if result.skipped is None:
            self._in_a_row[model] = 0
            return
        self.total += 1
        self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        whose = "" if model == "policy" else f" of the {model}"
        self._last = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}, {_places(result)}"
        self._note(f"step {step}{whose} is skipped, no weight has changed: {self._last}")

    @property
    def too_many(self) -> bool:
        """Whether more steps in a row were skipped than max_skipped_steps allows."""
        return max(self._in_a_row.values(), default=0) > self._limit

    def error(self, checkpoint: str) -> UserError:
        """What ends the run then; `checkpoint` holds its state."""
        most = max(self._in_a_row.values())
        which = "a step was" if most == 1 else f"{most} steps in a row were"
        return UserError(
            f"{which} skipped, since loss or gradient was not finite ({self._last}), and max_skipped_steps is "
            f"{self._limit}; the state is in {checkpoint}; find what overflows in those rows or their rewards, lower "
            "learning_rate, or raise max_skipped_steps"
        )


def _places(result: StepResult) -> str:
    rows = result.skipped.rows
    shown = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
    if result.skipped.located:
        return f"not finite in microbatches of dataset rows {shown}"
    return f"the loss of every microbatch was finite; the step's dataset rows are {shown or 'not known'}"
