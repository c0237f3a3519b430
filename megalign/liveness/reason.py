"""Why every rank of a job must leave now: what travels between ranks, as a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Reason:
    """The status that ranks end with, what is said once on each node, and whether they leave their stacks."""

    status: int
    text: str = ""  # nothing where whoever gives the reason has said it
    stacks: bool = False

    def to_line(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_line(cls, line: str) -> Reason:
        """What `to_line` made."""
        return cls(**json.loads(line))
