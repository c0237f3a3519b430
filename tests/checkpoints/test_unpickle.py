"""What a torch_dist checkpoint's .metadata may hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megalign.errors import UserError
from megalign.unpickle import read_metadata


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second is Python 3.13's
def test_the_path_that_a_writer_has_noted_is_read(module: str, tmp_path: Path) -> None:
    written = pickle.dumps(Metadata({}, storage_meta=StorageMeta(checkpoint_id=Path("/somewhere"))), protocol=2)
    (tmp_path / ".metadata").write_bytes(written.replace(b"cpathlib\nPosixPath", f"c{module}\nPosixPath".encode()))
    assert module.encode() + b"\n" in (tmp_path / ".metadata").read_bytes()
    assert read_metadata(tmp_path / ".metadata").storage_meta.checkpoint_id == Path("/somewhere")


def test_what_else_stands_beside_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02cpathlib._local\nos\n.")
    with pytest.raises(UserError, match=r"asks for pathlib\._local\.os, which"):
        read_metadata(tmp_path / ".metadata")
