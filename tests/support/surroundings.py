"""Run commands as real processes in unusual surroundings: users, locales, streams, file systems."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLEDGE = (sys.executable, "-m", "fledge")
LATIN_1 = "en_US.ISO-8859-1"
STRANGER = 4242  # a user id without an entry in /etc/passwd

_PRIVATE = ("HOME", "USER", "LOGNAME", "FLEDGE_CACHE", "XDG_CACHE_HOME", "PYTHONIOENCODING",
            "PYTHONUTF8", "LANG", "LC_ALL", "LC_CTYPE")  # fmt: skip


@dataclass(frozen=True)
class Surrounding:
    """What is unusual about the process of a command.

    Attributes:
        env: Environment variables.
        home: Whether HOME is set, to a folder that can be written to.
        before: Lines of a shell script that run before the command, in the same shell.
        streams: Redirections of the shell, such as `2>&-`.
        pipe: What follows the command in the shell, such as `| true`.
        words: Command line that runs the command, such as one of setpriv.
        root: Whether only root can make the surrounding.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    home: bool = True
    before: str = ""
    streams: str = ""
    pipe: str = ""
    words: tuple[str, ...] = ()
    root: bool = False

    def run(
        self, *command: str | bytes | Path, cwd: Path, timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command; its output is what reaches the streams that are left."""
        return subprocess.run(
            self.command(command),
            cwd=cwd,
            env=self.environment(cwd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def command(self, command: Sequence[str | bytes | Path]) -> list[str | bytes]:
        script = f'set -o pipefail\n{self.before}\n"$@" {self.streams} {self.pipe}'
        if not self.pipe:
            script = script.replace('"$@"', 'exec "$@"')
        return ["bash", "-c", script, "bash", *self.words, *map(os.fspath, command)]

    def environment(self, cwd: Path) -> dict[str, str]:
        if self.root and os.geteuid():
            pytest.skip("needs root")
        env = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
        if self.words:  # other users can't write where the coverage is measured
            env = {name: value for name, value in env.items() if not name.startswith("COVERAGE")}
        if self.home:
            env["HOME"] = str(cwd / "home")
            os.makedirs(env["HOME"], exist_ok=True)
        return {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.env}


def without_capabilities(*names: str) -> tuple[str, ...]:
    """The words that run a command as root, which then is subject to the permissions of files."""
    if os.geteuid():
        return ()
    return ("setpriv", f"--bounding-set={','.join(f'-{name}' for name in names)}")


LIKE_ANYONE = without_capabilities("dac_override", "dac_read_search", "fowner")
NO_NAME = (
    *("setpriv", "--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups"),
    # It may read the files of the tests and of Python, wherever they are.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


@functools.cache
def latin_1() -> dict[str, str]:
    """Environment variables of a locale whose encoding is ISO-8859-1."""
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/en_US").exists():
        pytest.skip("needs localedef")
    folder = Path(tempfile.mkdtemp(prefix="fledge-locale-"))
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / LATIN_1]
    subprocess.run(command, check=False, capture_output=True)
    if not (folder / LATIN_1).is_dir():
        pytest.skip("needs localedef")
    return {"LOCPATH": str(folder), "LC_ALL": LATIN_1}


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def workspace() -> Path:
    """A folder that any user can reach and write to. Folders of pytest are for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix="fledge surroundings-"))
    folder.chmod(0o777)
    return folder
