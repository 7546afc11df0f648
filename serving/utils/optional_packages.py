"""Optional packages: a clear error message if a needed package is not installed."""

from __future__ import annotations

import importlib.util

from serving.errors import FledgeError, OptionError


def require(
    package: str, purpose: str, remedy: str, *, error: type[FledgeError] = OptionError
) -> None:
    """Check that a package is installed.

    Args:
        package: Import name of the package.
        purpose: Start of the message, such as "Parquet" or "--engine ray".
        remedy: What the user can do, such as "pip install 'fledge[parquet]'; or use .csv".
        error: Class of the error.

    Raises:
        FledgeError: The package is not installed; the error's class is `error`.
    """
    if importlib.util.find_spec(package) is None:
        raise error(f"{purpose} needs {package}: {remedy}")
