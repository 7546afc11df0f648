"""What holds for every test."""

import os

# Before torch is loaded. The networks of the tests are so small that a second thread only gets in
# the way, and threads that spin while they wait starve whoever else has work here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
