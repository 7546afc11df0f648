"""What holds for every test."""

import os

# Set before torch is loaded: threads that spin while they wait starve whoever else has work here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
