"""The jobs, one file each: parse the command line, build the parts, run them. ``python -m jobs.X --help``."""

import os

# PyTorch's idle threads would spin on the cores that the native core's threads need. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Large tensors on huge pages: fresh memory costs a page fault every 4 KB otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
