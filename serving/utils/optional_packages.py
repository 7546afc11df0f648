"""Packages that Fledge can do without: a clear error where one is needed and missing."""

from __future__ import annotations

import importlib.util

from serving.errors import OptionError


def require(package: str, purpose: str, remedy: str) -> None:
    """Refuse a request that needs a package which is not installed.

    Args:
        package: Its import name.
        purpose: Begins the sentence, such as "Parquet" or "--engine ray".
        remedy: What to do, such as "pip install 'fledge[parquet]'; or use .csv".

    Raises:
        OptionError: The package is missing.
    """
    if importlib.util.find_spec(package) is None:
        raise OptionError(f"{purpose} needs {package}: {remedy}")
