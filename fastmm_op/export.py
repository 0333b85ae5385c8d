"""One plan as a single Python file that needs torch and Triton only.

The file's kernels are this package's own text (kernel_source.py), its launches those of the plan
(wrapper_source.py). It has the form that KernelBench evaluates: imports, kernels, wrapper
functions, ``class ModelNew``; no fallback, and nothing runs on import.
"""

import inspect
from dataclasses import replace

from fastmm_op.arch import card_text
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.kernel_source import Definition, with_dependencies
from fastmm_op.plan import reasons, write_plan
from fastmm_op.problem import Problem, runs_along_k
from fastmm_op.search import STAGES, other_stages
from fastmm_op.tiles import Choice
from fastmm_op.wrapper_source import LINE, TORCH_DTYPES, Wrapper, symbolic

IMPORTS = """\
import torch
import torch.nn as nn
import triton
import triton.language as tl"""

STRIDES = '''\
def strides(x: torch.Tensor) -> list[int]:
    """The strides of x; 0 for dimensions of size one, whose own may be anything."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]'''

CHECK = '''\
def check_operands(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise unless a and b are dense {dtype} matrices that can be multiplied, on a GPU.

    Raises:
        TypeError: another dtype, or no dense tensor.
        RuntimeError: sizes or devices do not match, no GPU, or a gradient is asked for.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dtype is not {dtype} or x.layout is not torch.strided:
            raise TypeError(f"{{name}} must be dense {dtype}, got {{x.dtype}}, {{x.layout}}")
        if x.is_neg():
            raise TypeError(f"{{name}} is a view whose negation is still to be done: resolve_neg()")
        if x.dim() != 2:
            raise RuntimeError(f"{{name}} must be a matrix, got shape {{tuple(x.shape)}}")
        if not (x.is_cuda or triton.knobs.runtime.interpret):
            raise RuntimeError(f"{{name}} must be on a CUDA device, got {{x.device}}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{{name}} requires a gradient, which this file does not compute")
    if a.device != b.device:
        raise RuntimeError(f"a and b must be on one device, got {{a.device}} and {{b.device}}")
    if a.shape[1] != b.shape[0]:
        raise RuntimeError(f"a is {{tuple(a.shape)}}, b {{tuple(b.shape)}}: inner sizes differ")'''

MATMUL = '''\
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of a (M, K) and b (K, N), both {dtype}: a new contiguous (M, N) tensor.

    Raises:
        TypeError, RuntimeError: as check_operands.
        ValueError: sizes or strides for which the constants below are wrong.
    """
    check_operands(a, b)
    M, K = a.shape
    N = b.shape[1]
    stride_am, stride_ak = strides(a)
    stride_bk, stride_bn = strides(b)
{locals}
    for holds, demand in (
{requirements}
    ):
        if not holds:
            raise ValueError(
                f"{{demand}}; got a {{tuple(a.shape)}} with strides {{a.stride()}}, "
                f"b {{tuple(b.shape)}} with strides {{b.stride()}}: export a file for such operands"
            )

{allocations}
    with torch.cuda.device_of(a):
{launches}
    return c'''

# Run again whenever a size is new: a pipeline as deep as is best changes no bits.
AUTOTUNE = """\
@triton.autotune(
    configs=[triton.Config({{}}, num_warps={warps}, num_stages=n) for n in {stages}],
    key=["M", "N", "K"],
)
"""

MODEL = '''\
class ModelNew(nn.Module):
    """``ModelNew()(A, B)`` is the product of A (M, K) and B (K, N); see matmul."""

    def forward(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return matmul(A, B)
'''


def exported_problem(problem: Problem) -> Problem:
    """The problem as the file's plan sees it: a card without the copy engine that Gluon drives.

    And without dependent launches: Triton's interpreter, which runs such files too, has none.
    """
    return replace(problem, arch=replace(problem.arch, tma=False, dependent_seconds=None))


def exported_choice(problem: Problem) -> Choice:
    """The best choice, by the model, among those of plain Triton kernels."""
    problem = exported_problem(problem)
    whole = (c for c in choices(problem) if c.slabs == c.b_classes == 1)
    return min(whole, key=lambda choice: estimate(problem, choice))


def tuned_stages(problem: Problem, choice: Choice) -> tuple[int, ...]:
    """The numbers of pipeline stages, 1 to 4, with which the choice's GEMM fits shared memory.

    Raises:
        ValueError: it has no pipeline.
    """
    if choice.tile.kernel != "gemm":
        raise ValueError("nothing to autotune: a one-wide product has no pipeline")
    problem = exported_problem(problem)
    deep = [*other_stages(problem, choice, STAGES), choice]
    return tuple(sorted({c.tile.num_stages for c in deep} & set(STAGES)))


def export(
    problem: Problem,
    command: str,
    version: str,
    choice: Choice | None = None,
    autotune: bool = False,
) -> str:
    """The text of a file that computes the problem, and others that its constants fit.

    Args:
        problem: one item, no batch.
        command: what makes this text, for the header.
        version: this package's.
        choice: one of ``choices(exported_problem(problem))``; ``exported_choice`` if None.
        autotune: the file's GEMM tries 1 to 4 pipeline stages at its first call of each size.

    Raises:
        ValueError: a batch, or a size of zero: there is nothing to launch; or nothing to autotune.
        LookupError: the kernels use something that such a file cannot hold.
    """
    if problem.batch != 1:
        raise ValueError(f"a file multiplies two matrices, got a batch of {problem.batch}")
    if 0 in (problem.M, problem.K, problem.N):
        raise ValueError(
            f"sizes must be at least 1, got M={problem.M}, K={problem.K}, N={problem.N}"
        )
    choice = choice or exported_choice(problem)
    variables = symbolic(exported_problem(problem))
    tuned = frozenset({"gemm"} if autotune else ())
    wrapper = Wrapper(variables, write_plan(variables, choice), tuned)
    definitions = with_dependencies(wrapper.kernels.values())
    if autotune:
        stages = tuned_stages(problem, choice)
        decorator = AUTOTUNE.format(warps=choice.tile.num_warps, stages=stages)
        definitions = [
            decorated(x, decorator) if x.name == "gemm_kernel" else x for x in definitions
        ]
    parts = [
        header(problem, choice, command, version) + IMPORTS,
        kernels_text(definitions),
        inspect.getsource(runs_along_k).rstrip(),
        STRIDES,
        CHECK.format(dtype=TORCH_DTYPES[problem.dtype]),
        matmul_text(problem, wrapper),
        MODEL,
    ]
    return "\n\n\n".join(parts)


def header(problem: Problem, choice: Choice, command: str, version: str) -> str:
    """A comment: what the file is for, where it comes from, and the plan."""
    precision = f', precision "{problem.precision}"' if problem.dtype == "fp32" else ""
    lines = [
        f"({problem.M}, {problem.K}) @ ({problem.K}, {problem.N}), {problem.dtype}{precision}, "
        f"for {card_text(problem.arch)}.",
        "",
        f"fastmm_op {version} wrote this from its own kernels; torch and Triton are all it needs:",
        f"    {command}",
        "",
        "Tiles, splits and other constants are planned for this product on this card. matmul takes",
        "others for which they are right as well, and refuses the rest; a file of their own may be",
        "faster.",
        "",
        "The plan; its estimates are the planner's model, not measurements:",
    ]
    lines += [f"- {reason}" for reason in reasons(exported_problem(problem), choice)]
    if problem.arch.tma:
        lines.append("- chosen among plain Triton kernels; fastmm_op itself may take one in Gluon")
    lines += ["", "Copyright (c) The fastmm authors. SPDX-License-Identifier: BSD-3-Clause"]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def decorated(definition: Definition, decorator: str) -> Definition:
    """A kernel with one decorator more, the outermost."""
    return replace(
        definition, text=definition.text.replace("@triton.jit", f"{decorator}@triton.jit")
    )


def kernels_text(definitions: list[Definition]) -> str:
    """Constants, then functions, none before what it uses."""
    constants = [x.text for x in definitions if not x.is_function]
    functions = [x.text for x in definitions if x.is_function]
    return "\n\n\n".join((["\n".join(constants)] if constants else []) + functions)


def matmul_text(problem: Problem, wrapper: Wrapper) -> str:
    def block(lines: list[str], spaces: int) -> str:
        return "\n".join(" " * spaces + line for line in lines)

    requirements: list[str] = []
    for holds, demand in wrapper.requirements():
        line = f'({holds}, "{demand}"),'
        fits = len(line) + 8 <= LINE
        requirements += [line] if fits else ["(", f"    {holds},", f'    "{demand}",', "),"]
    output = "c = torch.empty((M, N), dtype=a.dtype, device=a.device)"
    return MATMUL.format(
        dtype=TORCH_DTYPES[problem.dtype],
        locals=block(wrapper.locals(), 4) + "\n" if wrapper.local_names else "",
        requirements=block(requirements, 8),
        allocations=block([*wrapper.allocations(), output], 4),
        launches="\n".join(wrapper.launch(step, " " * 8) for step in wrapper.launches),
    )
