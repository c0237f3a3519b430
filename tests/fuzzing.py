"""What all tests with a fuzzer share."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def fuzzing(examples: int) -> settings:
    """The same examples in every run, and none left in a database; what fails is shown as it was drawn."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
