"""What all jobs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fledge
from tests.faults.file_operations import Operation


class CommandJob:
    """A job that is a command line of `fledge`."""

    inputs: Path
    work: Path
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def swept(self) -> Path:
        """The folder whose operations fail."""
        return self.work

    def command(self) -> list[str]:
        """Return the arguments of `fledge`."""
        raise NotImplementedError

    def run(self) -> int:
        """Run the command in this process."""
        return fledge.main(self.command())

    def again(self) -> int:
        """Run the same command again."""
        return self.run()

    def tolerates(self, operation: Operation) -> bool:
        """Tolerate nothing."""
        return False

    def says_why(self, operation: Operation) -> bool:
        """Say why, always."""
        return True

    def read(self, *names: str) -> dict[str, Any]:
        """Return the bytes of files in `work`; None for a missing file."""
        paths = {name: self.work / name for name in names}
        return {name: path.read_bytes() if path.exists() else None for name, path in paths.items()}
