"""Compiles the kernels of a plan for any card, with no GPU: for the command line and for tests."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from fastmm_op.arch import Arch, occupancy
from fastmm_op.launches import Descriptor, Launch, Pointer
from fastmm_op.problem import COPY_BYTES, Problem
from fastmm_op.running import KERNELS, hopper, launch_options

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: a thread.
        spills: load and store instructions to local memory in the machine code.
        shared_memory: bytes a block.
        opcodes: machine instructions, name (with modifiers) -> count.
        main_loop: those of the loop that is densest in matrix instructions or, if none has any, of
            the longest loop; empty in a kernel without loops.
        detours: those, outside of it, on the longer side of branches of which one side is executed.
    """

    registers: int
    spills: int
    shared_memory: int
    opcodes: dict[str, int]
    main_loop: dict[str, int]
    detours: dict[str, int]

    def count(self, prefix: str) -> int:
        """How many instructions have a name that starts with ``prefix``."""
        return count(self.opcodes, prefix)


def compile_launch(problem: Problem, step: Launch) -> CompiledKernel:
    """Compile one launch of a plan exactly as Triton's launcher would specialise it.

    Args:
        problem: the plan's problem: it says how the operands are aligned, and the architecture.
        step: one of the plan's launches.

    Raises:
        RuntimeError: in a process that interprets kernels (TRITON_INTERPRET=1).
    """
    return compile_kernel(KERNELS[step.kernel], problem, step)


def compile_kernel(
    function: triton.JITFunction | GluonJITFunction, problem: Problem, step: Launch
) -> CompiledKernel:
    """The same for a kernel that no plan launches; ``step`` says what it is launched with."""
    if not hasattr(function, "signature"):
        raise RuntimeError("codegen needs compiled kernels, but TRITON_INTERPRET is set")
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, arg) in enumerate(zip(function.params, step.args, strict=False)):
        specialised = not parameter.do_not_specialize
        if arg is None or (arg == 1 and specialised):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = arg
        else:
            signature[parameter.name] = argument_type(arg)
            if specialised and is_divisible(problem, arg):
                attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in step.constexprs.items():
        signature[name] = "constexpr"
        constants[(function.arg_names.index(name),)] = value
    make_source = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    source = make_source(function, signature, constants, attributes)
    capability = int(problem.arch.name.removeprefix("sm_"))
    options = launch_options(step)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def argument_type(arg: Pointer | Descriptor | int) -> str:
    """A kernel argument's type, in the words of Triton's signatures."""
    if isinstance(arg, Pointer):
        return "*" + {"int32": "i32"}.get(arg.dtype, arg.dtype)
    if isinstance(arg, Descriptor):
        return hopper.descriptor_type(arg.box, arg.pointer.dtype)
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


def is_divisible(problem: Problem, arg: Pointer | Descriptor | int) -> bool:
    """Whether Triton's launcher will find the argument divisible by 16."""
    if isinstance(arg, Pointer):
        operand = {"a": problem.a, "b": problem.b}.get(arg.buffer)
        return operand is None or operand.pointer_alignment == COPY_BYTES
    return isinstance(arg, int) and arg % 16 == 0


def resources(kernel: CompiledKernel) -> Resources:
    """Registers, spills and instructions of a compiled kernel, read with the tools Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = run_tool("nvdisasm", "-c", file.name)
    program, loops, sides = read_assembly(assembly)
    opcodes = Counter(program)
    spills = sum(n for name, n in opcodes.items() if name.split(".")[0] in ("LDL", "STL"))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    # The padding after a program's end is a jump to itself.
    loops = [loop for loop in loops if len(loop) > 2]
    # The densest: of nested loops the inner one.
    main = max(loops, key=lambda loop: density(opcodes_of(program, loop)), default=range(0))
    detours = {i for side in sides if not set(side) & set(main) for i in side}
    return Resources(
        registers,
        spills,
        kernel.metadata.shared,
        dict(opcodes),
        dict(opcodes_of(program, main)),
        dict(opcodes_of(program, sorted(detours))),
    )


def opcodes_of(program: list[str], positions: Iterable[int]) -> Counter[str]:
    return Counter(program[i] for i in positions)


def density(body: Counter[str]) -> tuple[float, int]:
    """The share of matrix instructions in a loop, and its length."""
    return count(body, MMA) / body.total(), body.total()


MMA = ("HMMA", "HGMMA")


def count(opcodes: dict[str, int], prefix: str | tuple[str, ...]) -> int:
    """How many instructions have a name that starts with a prefix, or one of several."""
    return sum(n for name, n in opcodes.items() if name.startswith(prefix))


def read_assembly(assembly: str) -> tuple[list[str], list[range], list[range]]:
    """The instruction names of nvdisasm's text, the loops, and the longer sides of branches.

    A loop is what lies between a label and a later branch back to it. A branch has two sides if
    the first one ends with a jump past the second.
    """
    program: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str, bool]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(program)
        elif instruction := INSTRUCTION.match(line):
            if target := re.search(r"BRA.*`\((\.L_\w+)\)", line):
                branches.append((len(program), target.group(1), "@" in line))
            program.append(instruction.group(1))
    found = [(at, labels[label], conditional) for at, label, conditional in branches]
    loops = [range(target, at + 1) for at, target, _ in found if target <= at]
    jumps = {at + 1: target for at, target, conditional in found if target > at and not conditional}
    longer = [
        max(range(at + 1, target), range(target, jumps[target]), key=len)
        for at, target, conditional in found
        if conditional and target > at and target in jumps
    ]
    return program, loops, longer


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")


def run_tool(name: str, *args: str) -> str:
    command = [str(TOOLS / name), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def blocks_per_sm(step: Launch, found: Resources, arch: Arch) -> int:
    """Blocks of a kernel that fit an SM at once, by registers, shared memory and threads."""
    return occupancy(
        found.registers,
        step.num_warps,
        found.shared_memory,
        arch.shared_memory_per_sm,
        arch.threads_per_sm,
    )
