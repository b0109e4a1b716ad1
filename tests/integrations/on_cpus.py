"""Runs a program with accelerate taking CPUs for devices: `torchrun … -m tests.integrations.on_cpus examples/sft_trainer.py …`.

It lifts the check that `tests.integrations.lifted` lifts, for a process that torchrun started.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    from accelerate import Accelerator

    Accelerator.multi_device = property(lambda self: self.use_distributed)
    os.environ["ACCELERATE_TAKES_CPUS"] = "1"
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
