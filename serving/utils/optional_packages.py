"""Optional packages: a clear error where one is needed and not installed."""

from __future__ import annotations

import importlib.util

from serving.errors import FledgeError, OptionError


def require(
    package: str, purpose: str, remedy: str, *, error: type[FledgeError] = OptionError
) -> None:
    """Check that a package is installed.

    Args:
        package: Its import name.
        purpose: Begins the sentence, such as "Parquet" or "--engine ray".
        remedy: What to do, such as "pip install 'fledge[parquet]'; or use .csv".
        error: Class of the error.

    Raises:
        FledgeError: An `error`, if the package is missing.
    """
    if importlib.util.find_spec(package) is None:
        raise error(f"{purpose} needs {package}: {remedy}")
