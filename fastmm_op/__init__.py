"""Matrix products for PyTorch that stay fast on odd sizes and in float32.

Importing registers ``torch.ops.fastmm.matmul`` and ``torch.ops.fastmm.linear``. No GPU is touched
and no kernel is loaded.
"""

import importlib

from fastmm_op import ops_graph as _ops_graph  # registers matmul and linear, in both their forms
from fastmm_op import ops_prepacked as _ops_prepacked
from fastmm_op.functional import linear, matmul
from fastmm_op.model import ModelNew
from fastmm_op.patching import patch, unpatch
from fastmm_op.prepacking import prepack

__version__ = "0.1.0"
__all__ = ["ModelNew", "linear", "matmul", "patch", "prepack", "unpatch"]
del _ops_graph, _ops_prepacked


def __getattr__(name: str):
    """``fastmm_op.compile``, imported when it is first used: it imports torch's compiler."""
    if name == "compile":
        return importlib.import_module("fastmm_op.compile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
