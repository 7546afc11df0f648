"""Check that an optional package is installed, with a helpful error message if not."""

from __future__ import annotations

import importlib.util

from serving.errors import FledgeError, OptionError


def require(
    package: str, purpose: str, remedy: str, *, error: type[FledgeError] = OptionError
) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: Import name of the package.
        purpose: What needs the package, such as "Parquet" or "--engine ray"; starts the message.
        remedy: What the user can do, such as "pip install pyarrow; or use .csv"; ends the
            message.
        error: Class of the error to raise.

    Raises:
        FledgeError: The package is not installed. The class of the error is `error`.
    """
    if importlib.util.find_spec(package) is None:
        raise error(f"{purpose} needs {package}: {remedy}")


def require_parquet() -> None:
    """Check that Parquet files can be read and written.

    Raises:
        OptionError: pyarrow is not installed.
    """
    require("pyarrow", "Parquet", "pip install pyarrow; or use .csv")
