"""What every run of the tests begins with."""

from __future__ import annotations

from tests.megatron_version import found_version, wanted_version


def pytest_report_header() -> str:
    """Which Megatron-Core is tested."""
    return f"megatron-core: {found_version()} (asked for: {wanted_version()})"
