"""The source text of Triton kernels, with all that they use of this package. Imports no Triton.

A kernel module is a row of imports, constants (one name each) and functions; what it uses of
another one comes by ``from fastmm_op.kernels.x import name``.
"""

import ast
import builtins
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "fastmm_op.kernels"
FOLDER = Path(__file__).parent / "kernels"
# The names that a kernel module's ordinary imports bind, and that a single file of kernels has too.
IMPORTED = {"torch", "triton", "tl"}


@dataclass(frozen=True)
class Definition:
    """A constant or a function at the top level of a kernel module.

    Attributes:
        module: the module's name in the package, as ``"gemm"``.
        name: what it defines.
        text: its lines, with decorators and the comment right above it.
        node: the same, parsed.
        uses: the names it reads and does not bind, Python's own among them.
    """

    module: str
    name: str
    text: str
    node: ast.FunctionDef | ast.Assign
    uses: tuple[str, ...]

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, ast.FunctionDef)

    @property
    def parameters(self) -> list[ast.arg]:
        return self.node.args.args


@dataclass(frozen=True)
class Module:
    """A kernel module: its definitions in order, and the modules that other names come from."""

    definitions: dict[str, Definition]
    imports: dict[str, str]


@cache
def read_module(name: str) -> Module:
    text = (FOLDER / f"{name}.py").read_text()
    lines = text.splitlines()
    definitions, imports = {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{PACKAGE}."):
            source = node.module.removeprefix(f"{PACKAGE}.")
            imports |= {alias.name: source for alias in node.names}
        elif defined := name_defined(node):
            text = source_text(node, lines)
            definitions[defined] = Definition(name, defined, text, node, names_used(node))
    return Module(definitions, imports)


def name_defined(node: ast.stmt) -> str | None:
    """What a statement defines, if that is a function or a constant."""
    match node:
        case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return None


def source_text(node: ast.FunctionDef | ast.Assign, lines: list[str]) -> str:
    """The lines of a definition, decorators and the comment right above it included."""
    decorators = getattr(node, "decorator_list", [])
    first = min(part.lineno for part in (node, *decorators)) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def names_used(node: ast.AST) -> tuple[str, ...]:
    """Names that a definition reads and does not bind itself, in order."""
    read, bound = {}, set()
    for part in ast.walk(node):
        if isinstance(part, ast.arg):
            bound.add(part.arg)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            bound.add(part.id)
        elif isinstance(part, ast.Name):
            read[part.id] = None
    return tuple(name for name in read if name not in bound)


def find_kernel(name: str) -> Definition:
    """The function ``<name>_kernel``, by the name that plans give it.

    Raises:
        LookupError: no module of kernels has it.
    """
    for path in sorted(FOLDER.glob("*.py")):
        if kernel := read_module(path.stem).definitions.get(f"{name}_kernel"):
            return kernel
    raise LookupError(f"no {name}_kernel in {FOLDER}")


def with_dependencies(kernels: Iterable[Definition]) -> list[Definition]:
    """The definitions that the kernels need, and the kernels: none before what it uses.

    Those of one module stay together, in the order of their source.

    Raises:
        LookupError: a kernel needs a name that is neither a definition of these modules nor one of
            ``IMPORTED``, or two modules have different definitions of one name.
    """
    needed: dict[str, list[str]] = {}

    def visit(definition: Definition) -> None:
        module = read_module(definition.module)
        for name in definition.uses:
            if name in module.imports:
                visit(read_module(module.imports[name]).definitions[name])
            elif name in module.definitions:
                if name not in (definition.name, *needed.get(definition.module, ())):
                    visit(module.definitions[name])
            elif name not in IMPORTED and not hasattr(builtins, name):
                raise LookupError(
                    f"{definition.name} of kernels/{definition.module}.py uses {name!r}, which a "
                    "file of plain Triton kernels does not have"
                )
        needed.setdefault(definition.module, []).append(definition.name)

    for kernel in kernels:
        visit(kernel)
    found: dict[str, Definition] = {}
    for module in in_import_order(needed):
        names = needed.get(module, ())
        for name, definition in read_module(module).definitions.items():
            if name not in names:
                continue
            if name in found and found[name].text != definition.text:
                raise LookupError(f"{name!r} is not the same in {found[name].module} and {module}")
            found.setdefault(name, definition)
    return list(found.values())


def in_import_order(modules: Iterable[str]) -> list[str]:
    """Kernel modules, and those that they import, none before what it imports."""
    order: dict[str, None] = {}
    for module in modules:
        sources = dict.fromkeys(read_module(module).imports.values())
        order |= dict.fromkeys([*in_import_order(sources), module])
    return list(order)
