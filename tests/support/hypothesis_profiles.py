"""Settings of Hypothesis for the property tests.

By default every run tries the same examples and keeps no database of failures. With
FLEDGE_HYPOTHESIS=deep each run draws new examples, twenty times as many:

    FLEDGE_HYPOTHESIS=deep .venv/bin/pytest tests/serving/inputs/test_tar_properties.py
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

DEEP = os.environ.get("FLEDGE_HYPOTHESIS", "") == "deep"
_FACTOR = 20 if DEEP else 1

# Hypothesis stores tables of Unicode there, by default in the current folder.
set_hypothesis_home_dir(Path(os.environ["FLEDGE_CACHE"]) / "hypothesis")


def examples(number: int) -> settings:
    """Settings of a property test: the number of examples in `make test`."""
    return settings(
        max_examples=number * _FACTOR,
        derandomize=not DEEP,
        database=None,
        deadline=None,  # a busy machine fails nothing
        print_blob=DEEP,
        suppress_health_check=[HealthCheck.too_slow],
    )
