"""FP8 is never on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class FP8GlobalStateManager:
    """As Megatron asks it."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """No."""
        return False


@contextlib.contextmanager
def fp8_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Nothing."""
    yield
