"""Settings for all tests: one torch thread, and a temporary cache folder."""

import os
import tempfile

# Set before torch is imported. The tests' networks are so small that a second thread makes them
# slower, and threads that spin while they wait slow down parallel test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The tests, and the processes that they start, must not use the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="fledge-tests-")
os.environ["FLEDGE_CACHE"] = _CACHE.name
os.environ.pop("FLEDGE_CACHE_GB", None)
