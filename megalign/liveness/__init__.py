"""Which ranks of the job are still there: one that died, or that stands still, ends the run with its name.

Imports no torch: a rank may die while the others still import theirs.
"""

from megalign.liveness.watch import await_verdict, end_job, join, leave, limited, start

__all__ = ["await_verdict", "end_job", "join", "leave", "limited", "start"]
