"""Whole models: ``torch.compile(model, backend="fastmm")``.

Importing this imports parts of torch's compiler; ``import fastmm_op`` does not import this.
"""

from fastmm_op.compile.backend import backend, options
from fastmm_op.compile.explain import Report, explain

__all__ = ["Report", "backend", "explain", "options"]
