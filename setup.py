"""Packaging. Torch and Triton are wide runtime requirements; CI pins them in constraints-ci.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
# Read, not imported: importing would need torch, which a build environment does not have.
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "fastmm_op/__init__.py").read_text(), re.M)

setup(
    name="fastmm_op",
    version=VERSION.group(1),
    description="Matrix products for PyTorch that stay fast on odd sizes and in float32",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The fastmm authors",
    license="BSD-3-Clause",
    packages=find_packages(include=["fastmm_op*"]),
    package_data={"fastmm_op.bench": ["suite.json"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "rich>=13",
        "platformdirs>=3",
    ],
    entry_points={
        # torch.compile(model, backend="fastmm") finds it by this.
        "torch_dynamo_backends": ["fastmm = fastmm_op.compile.backend:backend"],
    },
    extras_require={
        # numpy: Triton's interpreter needs it and does not say so.
        "test": ["pytest", "pytest-xdist", "expecttest", "numpy", "hypothesis", "matplotlib"],
        "bench": ["matplotlib"],
        "dev": ["ruff"],
    },
)
