"""The Triton kernels: one file an op, and what they share."""

import os

# Multiply-adds may fuse, as they always have; Triton 3.9 warns where this is left open.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
