"""The text encoder, the user model, and their training."""

import os

# Read by OpenMP when torch is loaded. Workers that spin while they wait starve whatever runs beside
# them on a small machine; asleep, two threads next to another busy process are about 2.7 times
# as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Read by CUDA's matrix library when it is loaded: without it no product is repeatable.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
