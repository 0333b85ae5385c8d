"""The text of the function that runs a plan: what it demands, its scratch memory, its launches.

The plan is written for a problem whose sizes and strides are Formulas. So grids, arguments and
memory come out as expressions of the operands, while compile-time constants stay as planned;
``Wrapper.requirements`` says what these constants demand of other operands.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fastmm_op.formula import Formula, node_of
from fastmm_op.kernel_source import Definition, find_kernel
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.packing import PACKING_KERNELS, block_spans
from fastmm_op.problem import COPY_BYTES, MIN_K_OF_PARTS, Operand, Problem

TORCH_DTYPES = {
    "fp32": "torch.float32",
    "fp16": "torch.float16",
    "bf16": "torch.bfloat16",
    "int32": "torch.int32",
}
OPERANDS = ("a", "b")
LINE = 100


def symbolic(problem: Problem) -> Problem:
    """The problem with the wrapper's variables for sizes and strides; one item, no batch."""

    def operand(layout: Operand, row_stride: str, k_stride: str) -> Operand:
        return replace(
            layout,
            row_stride=Formula.named(row_stride, layout.row_stride),
            k_stride=Formula.named(k_stride, layout.k_stride),
        )

    return replace(
        problem,
        M=Formula.named("M", problem.M),
        N=Formula.named("N", problem.N),
        K=Formula.named("K", problem.K),
        a=operand(problem.a, "stride_am", "stride_ak"),
        b=operand(problem.b, "stride_bn", "stride_bk"),
    )


VARIABLES = ("a", "b", "c", "M", "N", "K", "stride_am", "stride_ak", "stride_bn", "stride_bk")


class Wrapper:
    """The parts of ``matmul(a, b)`` as text.

    Args:
        problem: a symbolic one.
        plan: written for it; plain Triton kernels.
    """

    def __init__(self, problem: Problem, plan: Plan, tuned: frozenset[str] = frozenset()) -> None:
        """``tuned``: kernels whose warps and stages an autotuner says."""
        self.problem = problem
        self.tuned = tuned
        self.launches = plan.launches
        self.kernels = {step.kernel: find_kernel(step.kernel) for step in plan.launches}
        self.scratch_names = name_scratch(plan.launches, self.kernels)
        self.scratch = {
            arg.offset: arg
            for step in plan.launches
            for arg in step.args
            if isinstance(arg, Pointer) and arg.buffer == "workspace"
        }
        self.local_names = self.name_locals()

    def name_locals(self) -> dict[str, str]:
        """Expressions that occur more than once -> the name of the parameter that they go to.

        With the operand's name before it, where the parameter takes several.
        """
        whole = [step.grid for step in self.launches]
        whole += [piece.elements for piece in self.scratch.values()]
        whole += [arg for step in self.launches for arg in step.args]
        occurrences = Counter(
            ast.unparse(part)
            for value in whole
            if isinstance(value, Formula)
            for part in ast.walk(value.node)
            if isinstance(part, ast.expr)
        )
        uses: dict[str, tuple[str, str]] = {}
        for step in self.launches:
            values = arguments(step, self.kernels[step.kernel])
            for parameter, arg in values.items():
                text = ast.unparse(arg.node) if isinstance(arg, Formula) else ""
                if text not in (*VARIABLES, "") and occurrences[text] > 1:
                    uses.setdefault(text, ("_".join(operands_read(values)), parameter))
        takes = Counter(parameter for _, parameter in uses.values())
        names: dict[str, str] = {}
        for text, (operand, parameter) in uses.items():
            name = f"{operand}_{parameter}" if operand and takes[parameter] > 1 else parameter
            if name not in (*VARIABLES, *self.scratch_names.values(), *names.values()):
                names[text] = name
        # An expression may contain shorter ones.
        return dict(sorted(names.items(), key=lambda item: len(item[0])))

    def expression(self, value: Formula | int) -> str:
        """A Formula as text, in the wrapper's names."""
        return self.shorten(ast.unparse(node_of(value)))

    def shorten(self, text: str, but: str = "") -> str:
        """An expression with the names for its parts; ``but`` is a part that keeps its form."""
        names = {part: name for part, name in self.local_names.items() if part != but}
        return ast.unparse(UseNames(names).visit(ast.parse(text, mode="eval")))

    def locals(self) -> list[str]:
        """The assignments of the names that stand for longer expressions."""
        return [f"{name} = {self.shorten(text, text)}" for text, name in self.local_names.items()]

    def allocations(self) -> list[str]:
        """Scratch memory, one tensor a piece of the plan's workspace."""
        return [
            f"{self.scratch_names[offset]} = torch.empty({self.expression(piece.elements)}, "
            f"dtype={TORCH_DTYPES[piece.dtype]}, device=a.device)"
            for offset, piece in self.scratch.items()
        ]

    def launch(self, step: Launch, indent: str) -> str:
        """A launch with its arguments by name, on lines as the kernel's own parameters are."""
        kernel = self.kernels[step.kernel]
        values = arguments(step, kernel) | step.constexprs
        groups: dict[int, list[str]] = {}
        for parameter in kernel.parameters:
            text = self.argument(values[parameter.arg])
            groups.setdefault(parameter.lineno, []).append(f"{parameter.arg}={text}")
        options = [f"num_warps={step.num_warps}", f"num_stages={step.num_stages}"]
        if step.kernel in self.tuned:
            options = []
        lines = [f"{indent}{kernel.name}[({self.expression(step.grid)},)]("]
        for group in filter(None, (*groups.values(), options)):
            lines += fill(group, indent + "    ")
        return "\n".join([*lines, f"{indent})  # fmt: skip"])

    def argument(self, value: Pointer | Formula | int | str | None) -> str:
        if isinstance(value, Descriptor):
            raise LookupError("a TMA descriptor is not an argument of a plain Triton kernel")
        if isinstance(value, Pointer):
            if value.buffer == "workspace":
                return self.scratch_names[value.offset]
            if value.buffer not in VARIABLES:
                raise LookupError(f"a file that multiplies a and b has no {value.buffer}")
            return value.buffer
        if isinstance(value, Formula):
            return self.expression(value)
        return json.dumps(value) if isinstance(value, str) else repr(value)

    def requirements(self) -> Iterator[tuple[str, str]]:
        """(expression, what it says) of all that the constants of the launches demand."""
        yield "min(M, K, N) > 0", "every size must be at least 1"
        for name, operand in zip(OPERANDS, (self.problem.a, self.problem.b), strict=True):
            strides = f"{self.expression(operand.row_stride)}, {self.expression(operand.k_stride)}"
            along_k = operand.k_major
            order = "row-major" if along_k == (name == "a") else "column-major"
            yield (
                f"{'' if along_k else 'not '}runs_along_k({strides})",
                f"{name} must be {order}",
            )
        for step in self.launches:
            yield from self.demands(step)

    def demands(self, step: Launch) -> Iterator[tuple[str, str]]:
        """What one launch's constants say about the operands that is not true of all."""
        constant = step.constexprs
        arg = arguments(step, self.kernels[step.kernel])
        if step.kernel == "pack_rows":
            width = constant["BLOCK_K"]
            yield f"{self.expression(arg['pitch'])} <= {width}", f"K must be at most {width}"
        if step.kernel in PACKING_KERNELS and not constant["WIDE"]:
            packed_pitch = constant.get("PARTS", 1) * arg["pitch"]
            spans = block_spans(arg["stride_xr"], arg["stride_xk"], packed_pitch)
            yield self.narrow(spans), "no two elements of one block may be 2**31 elements apart"
        if step.kernel == "gemv":
            name = "M" if self.problem.M == 1 else "N"
            yield f"{name} == 1", f"{name} must be 1"
        if step.kernel == "gemm":
            yield from self.gemm_demands(constant, arg)

    def narrow(self, spans: tuple[Formula | int, ...]) -> str:
        """That 32 bits hold every one of some spans."""
        texts = dict.fromkeys(self.expression(span) for span in spans)
        return f"max({', '.join(texts)}) < 2**31"

    def gemm_demands(self, constant: dict, arg: dict) -> Iterator[tuple[str, str]]:
        block_m, block_n, block_k = (constant[f"BLOCK_{axis}"] for axis in "MNK")
        if constant["EVEN_K"] and isinstance(arg["K"].node, ast.Name):
            yield f"K % {block_k} == 0", f"K must be a multiple of {block_k}"
        elif constant["TAIL_RUN"] > 1 and not constant["EVEN_K"]:
            run = constant["TAIL_RUN"]
            yield f"K % {run} == 0", f"K must be a multiple of {run}"
        for name, rows in zip(OPERANDS, "mn", strict=True):
            elements = constant[f"{name.upper()}_ALIGN"]
            if arg[f"{name}_ptr"].buffer != name or elements == 1:
                continue
            along_k = constant[f"{name.upper()}_K_MAJOR"]
            within, between = f"stride_{name}k", f"stride_{name}{rows}"
            if not along_k:
                within, between = between, within
                size = rows.upper()
                yield f"{size} % {elements} == 0", f"{size} must be a multiple of {elements}"
            lines = "rows" if along_k == (name == "a") else "columns"
            yield (
                f"{name}.data_ptr() % {COPY_BYTES} == 0 and {within} == 1 "
                f"and {between} % {elements} == 0",
                f"{lines} of {name} must be contiguous and {COPY_BYTES}-byte aligned",
            )
        if constant["PARTS"] == 2:
            holds = f"K >= {MIN_K_OF_PARTS} and min(M, N) > 1"
            yield holds, f"hi and lo want a K of at least {MIN_K_OF_PARTS}, M and N of at least 2"
        if not constant["WIDE"]:
            spans = (
                block_m * arg["stride_am"] + block_k * arg["stride_ak"],
                block_n * arg["stride_bn"] + block_k * arg["stride_bk"],
                block_m * arg["N"],
            )
            yield self.narrow(spans), "no two elements of one tile may be 2**31 elements apart"


def arguments(step: Launch, kernel: Definition) -> dict[str, Pointer | Descriptor | int | None]:
    """A launch's run-time arguments by name."""
    names = [parameter.arg for parameter in kernel.parameters]
    return dict(zip(names, step.args, strict=False))


def operands_read(values: dict) -> list[str]:
    """Which of the caller's operands are among a launch's arguments."""
    return [arg.buffer for arg in values.values() if getattr(arg, "buffer", None) in OPERANDS]


def name_scratch(launches: tuple[Launch, ...], kernels: dict[str, Definition]) -> dict[int, str]:
    """A name for each piece of the workspace, by its offset.

    What is used beside one operand only is called after it and the parameter that it is there, and
    what is used beside both after the parameter that takes it last.
    """
    owners: dict[int, str] = {}
    names: dict[int, str] = {}
    for step in launches:
        values = arguments(step, kernels[step.kernel])
        pieces = {
            parameter: arg
            for parameter, arg in values.items()
            if isinstance(arg, Pointer) and arg.buffer == "workspace"
        }
        beside = set(operands_read(values))
        beside |= {owners[piece.offset] for piece in pieces.values() if piece.offset in owners}
        for parameter, piece in pieces.items():
            if piece.elements is None:
                raise LookupError(f"{step.kernel}: {parameter} is no whole piece of the workspace")
            if piece.offset in owners:
                continue
            stem = parameter.removesuffix("_ptr")
            if len(beside) == 1:
                (owners[piece.offset],) = beside
                stem = f"{owners[piece.offset]}_{stem}"
            names[piece.offset] = stem
    if len(set(names.values())) < len(names):
        raise LookupError(f"two pieces of the workspace have one name: {sorted(names.values())}")
    return names


class UseNames(ast.NodeTransformer):
    """Replaces expressions, given as text, by names; of nested ones the outer."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit(self, node: ast.AST) -> ast.AST:
        name = self.names.get(ast.unparse(node)) if isinstance(node, ast.expr) else None
        return ast.Name(name) if name else self.generic_visit(node)


def fill(items: list[str], indent: str) -> list[str]:
    """Items on as few lines as hold them, each with a comma."""
    lines = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= LINE:
            lines[-1] += f" {item},"
        else:
            lines.append(f"{indent}{item},")
    return lines
