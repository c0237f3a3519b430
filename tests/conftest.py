"""What every run of the tests begins with."""

from __future__ import annotations

import pytest

from tests.megatron_version import found_version, wanted_version
from tests.ranks import close_idle_ranks
from tests.tiny import TinyModels


def pytest_report_header() -> str:
    """Which Megatron-Core is tested."""
    return f"megatron-core: {found_version()} (asked for: {wanted_version()})"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """One tiny model of each family for all tests; nothing may change it."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))


def pytest_runtest_teardown() -> None:
    """Ranks that no test has asked for of late leave the cores to those that come."""
    close_idle_ranks()
