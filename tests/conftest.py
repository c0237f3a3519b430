"""What every run of the tests begins with."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megalign import launch
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


@pytest.fixture(autouse=True)
def no_job_of_an_earlier_test() -> Iterator[None]:
    """A tool that ran in this process describes its job in the environment; later tests' processes are not of it."""
    yield
    for name in launch.alone():
        os.environ.pop(name, None)


def pytest_runtest_teardown() -> None:
    """Ranks that no test has asked for of late leave the cores to those that come."""
    close_idle_ranks()
