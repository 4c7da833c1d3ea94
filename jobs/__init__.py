"""The jobs, one file each: parse the command line, build the parts, run them. ``python -m jobs.X --help``."""

import os

ENVIRONMENT = {
    # PyTorch's idle threads would spin on the cores that the native core's threads need.
    "OMP_WAIT_POLICY": "passive",
    # Large tensors on huge pages: fresh memory costs a page fault every 4 KB otherwise.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""What a job sets before torch is imported, where the user has not."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
