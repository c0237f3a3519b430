"""One writer at a time of a directory: a locked file beside what is not whole yet, let go of with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from megalign.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class OutputLock:
    """The right to write `target`; its file is in `home`, a directory that exists, and goes when it is released.

    A killed process leaves the file, which nobody holds then.
    """

    def __init__(self, target: Path, home: Path) -> None:
        self._target, self._file = target, home / f".{target.name}.lock"
        self._held: IO[bytes] | None = None

    def take(self) -> None:
        """UserError where another process has it, or the file cannot be made.

        A file system without locks (Lustre unless mounted with flock) has none to give: a training must not end for
        that when it writes its model.
        """
        try:
            while self._held is None:
                self._held = self._locked()
        except BlockingIOError as error:
            raise UserError(
                f"{self._target} is being written by another process, which holds {self._file}; wait for its end, or "
                "choose another directory"
            ) from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._file.unlink(missing_ok=True)
                print(f"megalign: two processes must not write {self._target} at once: {error}", file=sys.stderr)
                return
            raise UserError(f"cannot lock {self._file} ({error}); choose a directory that can be written") from error

    def release(self) -> None:
        """Nothing where it is not held."""
        if self._held is not None:
            self._file.unlink(missing_ok=True)  # while it is locked: who opened it meanwhile finds it gone
            self._held.close()
            self._held = None

    def _locked(self) -> IO[bytes] | None:
        """The file; None where it was removed, by who had it before, between opening and locking."""
        opened = self._file.open("wb")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            opened.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened.fileno()), self._file.stat()):
                return opened
        opened.close()
        return None
