"""The rules by which KernelBench accepts a submission in Triton, as far as reading can tell.

From its static checker and evaluator, as of 2026-03 (commit 423217d): what is an error there, and
what this project asks of the form of a file beside it. What a product must fulfil is here too.
"""

import ast
import re

# torch.allclose of a product of torch.rand inputs with torch's own IEEE fp32 one.
TOLERANCE = 1e-4
# Errors, in comments and texts as well.
FORBIDDEN = {
    "a try block": r"\btry\s*:",
    "an except clause": r"\bexcept\b",
    "the word pass": r"\bpass\b",
    "patched timing": r"cuda\.Event|elapsed_time|synchronize|time\.(time|perf_counter)",
    "threads": r"\b(threading|Thread|multiprocessing|concurrent)\b",
    "a lazy tensor": r"_make_subclass|_make_wrapper_subclass|__torch_dispatch__",
    "inputs of its own": r"\bget_(init_)?inputs\b",
    "a main program": r"__main__",
}
REQUIRED = {"a Triton kernel": r"@triton\.(jit|autotune)", "Triton's language": r"\btl\.\w"}
# Warnings there: work that torch does, lower precision than asked for, other streams.
SUSPICIOUS = {
    "a product by torch": r"\btorch\.(mm|bmm|matmul|einsum|addmm)\b|F\.linear|nn\.Linear",
    "a cast": r"\.half\(|\.to\(\s*torch\.float16|tl\.astype",
    "a stream": r"\bStream\b",
}
IMPORTS = ["import torch", "import torch.nn as nn", "import triton", "import triton.language as tl"]


def faults(text: str) -> list[str]:
    """What is wrong with a submission's text; none if it is accepted without a warning."""
    found = [f"has {what}" for what, pattern in FORBIDDEN.items() if re.search(pattern, text)]
    found += [f"lacks {what}" for what, pattern in REQUIRED.items() if not re.search(pattern, text)]
    found += [f"may be {what}" for what, pattern in SUSPICIOUS.items() if re.search(pattern, text)]
    return found + faults_of_form(ast.parse(text))


def faults_of_form(tree: ast.Module) -> list[str]:
    """Imports, kernels (and their constants), wrapper functions, ModelNew: these, in this order."""
    parts = [part(node) for node in tree.body]
    found = [
        f"line {tree.body[i].lineno} belongs nowhere" for i, p in enumerate(parts) if p is None
    ]
    known = [p for p in parts if p is not None]
    if known != sorted(known):
        found.append("is not in the order imports, kernels, wrappers, ModelNew")
    if set(known) != {0, 1, 2, 3} or parts[-1] != 3 or parts.count(3) != 1:
        found.append("does not end with the class ModelNew")
    imports = [ast.unparse(node) for node in tree.body if part(node) == 0]
    if imports != IMPORTS:
        found.append(f"imports {imports}")
    return found


def part(node: ast.stmt) -> int | None:
    """The part of a file that a statement at its top level belongs to; None: to no part."""
    match node:
        case ast.Import() | ast.ImportFrom():
            return 0
        case ast.Assign() if "tl.constexpr" in ast.unparse(node.value):
            return 1
        case ast.FunctionDef():
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            is_kernel = any(
                name.startswith(("triton.jit", "triton.autotune")) for name in decorators
            )
            return 1 if is_kernel else 2
        case ast.ClassDef(name="ModelNew"):
            return 3
    return None
