"""Is the matrix of Triton versions written as people read it?"""

from benchmarks import codegen_matrix


def test_the_codegen_matrix_becomes_a_table():
    kernel = {
        "kernel": "gemm", "registers": 255, "spills": 0, "shared_memory": 49152,
        "blocks_per_sm": 2, "loop_instructions": 142, "mma": 64, "loop_instructions_per_mma": 2.22,
    }  # fmt: skip
    pack = kernel | {"kernel": "pack_rows", "loop_instructions_per_mma": None}
    kernels = [{"dtype": "fp32", "precision": "tf32", **k} for k in (pack, kernel)]
    results = {
        "command": "codegen_matrix.py", "date": "2026-11-22", "commit": "0" * 40,
        "tritons": {"3.6.0": kernels, "3.7.1": kernels},
    }  # fmt: skip
    rows = [
        line for line in codegen_matrix.table(results).splitlines() if line.startswith("| fp32")
    ]
    assert rows == [
        "| fp32, tf32 | pack_rows | 3.6.0 | 255 | 0 | 49152 | 2 | 142 | 64 | - |",
        "| fp32, tf32 | pack_rows | 3.7.1 | 255 | 0 | 49152 | 2 | 142 | 64 | - |",
        "| fp32, tf32 | gemm | 3.6.0 | 255 | 0 | 49152 | 2 | 142 | 64 | 2.22 |",
        "| fp32, tf32 | gemm | 3.7.1 | 255 | 0 | 49152 | 2 | 142 | 64 | 2.22 |",
    ]
