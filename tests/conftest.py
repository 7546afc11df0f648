"""What holds for every test."""

import os
import tempfile

# Before torch is loaded. The networks of the tests are so small that a second thread only gets in
# the way, and threads that spin while they wait starve whoever else has work here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Nor is the cache of whoever runs the tests; processes that they start inherit this.
_CACHE = tempfile.TemporaryDirectory(prefix="fledge-tests-")
os.environ["FLEDGE_CACHE"] = _CACHE.name
os.environ.pop("FLEDGE_CACHE_GB", None)
