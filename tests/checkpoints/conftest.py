"""The fixture of this folder."""

from tests.checkpoints.models import converted

__all__ = ["converted"]
