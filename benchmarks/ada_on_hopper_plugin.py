"""A pytest plugin: every process of a test run, workers too, builds the RTX 4090's kernels.

    python -m pytest -p benchmarks.ada_on_hopper_plugin ...

with the folder of ``ada_on_hopper.prepare`` in ADA_ON_HOPPER.
"""

import os
from pathlib import Path

from benchmarks.ada_on_hopper import prepare

prepare(Path(os.environ["ADA_ON_HOPPER"]))
