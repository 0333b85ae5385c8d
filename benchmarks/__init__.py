"""The benchmark and its report. Run from the repository: ``python benchmarks/bench_matmul.py``."""
