"""Is an exported file what it says: alone, in order, right, and refusing what it cannot compute?"""

import ast
import builtins
import inspect
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the command line's tables need rich")

from benchmarks import judge_export, kernelbench_rules
from cases import LAYOUTS, at_offset, negated_view
from exports import CASES, SEED, SEEDS, Case, every_case, load, other_shapes
from fastmm_op import __main__, kernel_source
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.export import IMPORTS, export, exported_problem
from fastmm_op.problem import Epilogue
from oracle import assert_accurate

ROOT = Path(__file__).resolve().parents[1]


# Form


def is_kernel(node: ast.stmt) -> bool:
    decorators = [ast.unparse(x) for x in getattr(node, "decorator_list", [])]
    return isinstance(node, ast.FunctionDef) and decorators == ["triton.jit"]


def section(node: ast.stmt) -> int:
    """Which of a file's parts, in their order, a statement at its top level belongs to."""
    if isinstance(node, ast.Import):
        return 0
    if isinstance(node, ast.Assign) and "tl.constexpr" in ast.unparse(node.value):
        return 1
    if is_kernel(node):
        return 2
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        return 3
    assert isinstance(node, ast.ClassDef), f"what is {ast.unparse(node)} doing in the file?"
    return 4


@every_case
def test_form(case) -> None:
    """Imports, constants, kernels, wrappers, ModelNew, in this order, and nothing else."""
    body = ast.parse(case.text).body
    sections = [section(node) for node in body]
    assert sections == sorted(sections)
    assert {0, 2, 3, 4} <= set(sections)
    imports = [ast.unparse(node) for node in body if section(node) == 0]
    assert imports == IMPORTS.splitlines() == [
        "import torch",
        "import torch.nn as nn",
        "import triton",
        "import triton.language as tl",
    ]  # fmt: skip
    assert not any(isinstance(x, ast.ImportFrom) for x in ast.walk(ast.parse(case.text)))
    (model,) = (node for node in body if section(node) == 4)
    assert model.name == "ModelNew"
    assert [ast.unparse(base) for base in model.bases] == ["nn.Module"]
    docstring, forward = model.body
    assert isinstance(docstring.value, ast.Constant)
    assert [arg.arg for arg in forward.args.args] == ["self", "A", "B"]
    assert forward.name == "forward"


@every_case
def test_what_evaluators_reject_is_not_there(case) -> None:
    """The rules of KernelBench's static check, comments included, and those of this project."""
    for word in ("pass", "try", "except"):
        assert not re.search(rf"\b{word}\b", case.text), word
    assert not any(isinstance(x, ast.Try | ast.Pass) for x in ast.walk(ast.parse(case.text)))
    assert "__main__" not in case.text
    assert "get_inputs" not in case.text
    assert "get_init_inputs" not in case.text
    assert "def test" not in case.text
    # Products that torch computes, casts that it makes, streams and threads would be warnings.
    for pattern in (
        r"\btorch\.(mm|bmm|matmul|einsum|addmm|relu|clamp)\b",
        r"torch\.nn\.(?!Module)\w",
        r"functional",
        r"\.half\(|\.to\(\s*(dtype\s*=\s*)?torch\.|tl\.astype",
        r"Stream|thread|multiprocessing|_make_subclass",
    ):
        assert not re.search(pattern, case.text), pattern


@every_case
def test_kernelbench_has_nothing_against_it(case) -> None:
    assert kernelbench_rules.faults(case.text) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("import triton\n", "import triton\nimport os\n", "imports ["),
        ("@triton.jit\ndef pack_rows_kernel", "def pack_rows_kernel", "is not in the order"),
        ("return matmul(A, B)\n", "return torch.mm(A, B)\n", "may be a product by torch"),
        ("return matmul(A, B)\n", "return matmul(A, B)\n\n\nX = 1\n", "belongs nowhere"),
        ("return matmul(A, B)\n", "return matmul(A, B)\n\n\ndef f():\n    return 1\n", "the order"),
        ("class ModelNew", "class Model", "does not end with the class ModelNew"),
        ("M, K = a.shape", "M, K = a.shape  # pass", "has the word pass"),
        (
            "M, K = a.shape",
            "try:\n        M, K = a.shape\n    finally:\n        K",
            "has a try block",
        ),
        ("    return c\n", "    return c.half()\n", "may be a cast"),
    ],
)
def test_what_kernelbench_would_have_against_it(old, new, fault) -> None:
    text = CASES["packed in one read"].text
    assert old in text
    found = kernelbench_rules.faults(text.replace(old, new, 1))
    assert any(fault in line for line in found), found


@pytest.mark.interpreted
def test_a_file_is_judged_in_a_process_of_its_own(tmp_path, capsys) -> None:
    """As on a GPU, but small: accepted, and the verdict written."""
    assert judge_export.main(["--arch", "sm_89", "--out", str(tmp_path)]) == 0
    assert "export for sm_89: accepted" in capsys.readouterr().out
    verdict = json.loads((tmp_path / "export_sm_89.json").read_text())
    assert [run["shape"] for run in verdict["runs"]] == list(map(list, judge_export.SMALL_SHAPES))
    wrong = [verdict["runs"][0] | {"close": False}]
    assert not judge_export.accepted(verdict | {"runs": wrong})
    assert not judge_export.accepted(verdict | {"runs": []})
    assert not judge_export.accepted(verdict | {"faults": ["has the word pass"]})


@every_case
def test_kernels_are_the_packages_own_text(case) -> None:
    """Those of the plan, with docstrings; every name is defined above its use."""
    launched = {f"{step.kernel}_kernel" for step in case.plan.launches}
    body = ast.parse(case.text).body
    documented = {x.name for x in body if is_kernel(x) and ast.get_docstring(x)}
    assert launched <= documented
    running = pytest.importorskip("fastmm_op.running")
    for step in case.plan.launches:
        kernel = running.KERNELS[step.kernel]
        assert f"\n\n\n{inspect.getsource(kernel.fn)}\n" in case.text
    known = {"torch", "nn", "triton", "tl"}
    for node in body:
        if section(node) in (1, 2):
            used = set(kernel_source.names_used(node)) - set(dir(builtins))
            name = node.name if isinstance(node, ast.FunctionDef) else node.targets[0].id
            assert used <= known | {name}
            known.add(name)


@every_case
def test_lines_are_short_and_clean(case) -> None:
    assert case.text.isascii()
    assert case.text.endswith("return matmul(A, B)\n")
    for line in case.text.splitlines():
        assert len(line) <= 100, line
        assert line == line.rstrip(), line


def test_no_plan_of_a_file_needs_gluon() -> None:
    for case in SEEDS.values():
        kernels = {step.kernel for step in case.plan.launches}
        assert "gemm_hopper" not in kernels
        best = min(
            (c for c in choices(exported_problem(case.problem)) if c.tile.kernel == "gemm"),
            key=lambda c: estimate(exported_problem(case.problem), c),
        )
        assert case.choice == best


def test_the_header_says_whence_and_what_for() -> None:
    text = SEEDS["seed, fp32, tf32, sm_90"].text
    header = text[: text.index("import torch")]
    assert all(line.startswith("#") for line in header.splitlines())
    for part in (
        '(8205, 2949) @ (2949, 5921), fp32, precision "tf32", for sm_90 with 132 SMs',
        "the command",
        "packed as scaled fp16",
        "not measurements",
        "Gluon",
        "BSD-3-Clause",
    ):
        assert part in header


# The command


COMMANDS = [
    ["--shape", "33", "130", "65"],
    ["--shape", *map(str, SEED), "--dtype", "bf16", "--arch", "sm_90", "--sms", "78"],
    ["--shape", *map(str, SEED), "--arch", "sm_90", "--bandwidth", "2863"],
    ["--shape", "64", "512", "96", "--precision", "ieee", "--layout", "TN", "--arch", "sm_80"],
    ["--shape", *map(str, SEED), "--arch", "sm_89", "--autotune"],
]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_the_command_in_the_header_writes_the_same_file(args, capsys, tmp_path) -> None:
    assert __main__.main(["export", *args]) == 0
    text = capsys.readouterr().out
    (command,) = re.findall(r"^#     python -m fastmm_op (.*)$", text, re.MULTILINE)
    assert __main__.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == text
    path = tmp_path / "model_new.py"
    assert __main__.main(["export", *args, "--output", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "0", "3", "4"], "sizes must be at least 1, got M=0, K=3, N=4"),
        (["--shape", "2", "3", "4", "--output", "/nowhere/at/all.py"], "/nowhere/at/all.py"),
        (["--shape", "1", "300", "37", "--autotune"], "a one-wide product has no pipeline"),
    ],
)
def test_what_the_command_cannot_do(args, message, capsys) -> None:
    assert __main__.main(["export", *args, "--arch", "sm_89"]) == 2
    got = capsys.readouterr()
    assert got.out == ""
    assert message in got.err


def test_no_batch() -> None:
    with pytest.raises(ValueError, match="got a batch of 2"):
        export(replace(CASES["direct"].problem, batch=2), "", "0")


def test_no_other_operands() -> None:
    problem = replace(CASES["direct"].problem, epilogue=Epilogue(bias=True))
    with pytest.raises(LookupError, match="has no bias"):
        export(problem, "", "0")


def test_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from fastmm_op.__main__ import main; "
        "sys.exit(main(['export', '--shape', '33', '130', '65', '--arch', 'sm_89']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "class ModelNew" in done.stdout


# Numbers


CHILD = """
import importlib.util, sys
import torch
sys.modules["fastmm_op"] = None  # importing it is an error
torch.use_deterministic_algorithms(True)  # torch.empty is NaN
folder = sys.argv[1]
runs = torch.load(folder + "/runs.pt")
for run in runs:
    spec = importlib.util.spec_from_file_location("model_new", run["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run["got"] = [module.ModelNew()(a, b) for a, b in run["operands"]]
torch.save(runs, folder + "/runs.pt")
assert not any(name.startswith("fastmm") for name, x in sys.modules.items() if x)
"""


@pytest.mark.interpreted
def test_the_packages_own_bits_without_the_package(tmp_path) -> None:
    """Every small file, alone in another process, at several shapes."""
    from fastmm_op import launch, running

    runs = []
    for i, case in enumerate(CASES.values()):
        path = tmp_path / f"file_{i}.py"
        path.write_text(case.text)
        operands = [case.operands(*shape) for shape in other_shapes(case)]
        runs.append({"file": str(path), "operands": operands})
    torch.save(runs, tmp_path / "runs.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "runs.pt")
    for (name, case), run in zip(CASES.items(), got, strict=True):
        for (a, b), c in zip(run["operands"], run["got"], strict=True):
            what = f"{name}, {tuple(a.shape)} @ {tuple(b.shape)}"
            problem = launch.describe(a[None], b[None], case.precision, ARCHES[case.arch])
            want = torch.full_like(c, torch.nan)
            running.run_plan(case.plan_for(problem), a[None], b[None], want)
            assert torch.equal(c, want), what
            assert_accurate(c, a, b, case.precision, what)


@pytest.mark.interpreted
def test_one_row_in_a_file_for_many(tmp_path) -> None:
    """The package would not round it; rounded, as here, it still keeps the promise of tf32."""
    for name in ("direct", "packed in one read", "packed, split"):
        module = load(CASES[name].text, tmp_path)
        a, b = CASES[name].operands(3, 200, 5)
        for x, y in ((a[:1], b), (a[:2, :2], b[:2]), (a[:, :7], b[:7])):
            assert_accurate(module.matmul(x, y), x, y, what=name)


# Autotuning


def autotuned(case: Case) -> str:
    return export(case.problem, "the command", "0", case.choice, autotune=True)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("seed, fp32, tf32, sm_89", [1, 2, 3, 4]),
        ("seed, fp32, tf32, sm_90", [1, 2, 3, 4]),
        ("seed, fp32, ieee, sm_89", [1, 2, 3, 4]),
    ],
)
def test_autotuning_tries_pipelines(name, stages, tmp_path) -> None:
    """Of the GEMM alone, whose own number is among them; the rest of the file stays as it is."""
    case = SEEDS[name]
    text = autotuned(case)
    assert kernelbench_rules.faults(text) == []
    for line in text.splitlines():
        assert len(line) <= 100
    tile = case.choice.tile
    assert tile.num_stages in stages
    (module, plain) = load(text, tmp_path), load(case.text, tmp_path)
    configs = [(c.num_warps, c.num_stages, c.kwargs) for c in module.gemm_kernel.configs]
    assert configs == [(tile.num_warps, n, {}) for n in stages]
    assert module.gemm_kernel.fn.fn.__code__.co_code == plain.gemm_kernel.fn.__code__.co_code
    for step in case.plan.launches[:-1]:
        assert type(getattr(module, f"{step.kernel}_kernel")) is type(plain.gemm_kernel)


@pytest.mark.interpreted
def test_an_autotuned_file_computes_the_same_bits(tmp_path) -> None:
    """Whichever is fastest: here a number of stages says how long it took."""
    case = CASES["packed in two reads"]
    a, b = case.operands(*case.shape)
    want = load(case.text, tmp_path).matmul(a, b)
    module = load(autotuned(case), tmp_path)
    tuner = module.gemm_kernel
    tuner._bench = lambda *args, config, **meta: abs(config.num_stages - 2)
    assert torch.equal(module.matmul(a, b), want)
    assert tuner.best_config.num_stages == 2


# Errors


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, b: (a.half(), b), TypeError, "a must be dense torch.float32, got torch.float16"),
        (lambda a, b: (a, b.double()), TypeError, "b must be dense torch.float32"),
        (lambda a, b: (a.to_sparse(), b), TypeError, "torch.sparse_coo"),
        (lambda a, b: (negated_view(a), b), TypeError, "a is a view whose negation"),
        (lambda a, b: (a[None], b), RuntimeError, r"a must be a matrix, got shape \(1, 64, 128\)"),
        (lambda a, b: (a, b[:, 0]), RuntimeError, r"b must be a matrix, got shape \(128,\)"),
        (lambda a, b: (a, b[:-1]), RuntimeError, r"a is \(64, 128\), b \(127, 96\): inner sizes"),
        (lambda a, b: (a, b.to("meta")), RuntimeError, "on one device, got cpu and meta"),
        (lambda a, b: (a.requires_grad_(), b), RuntimeError, "a requires a gradient"),
        (lambda a, b: (a[:0], b), ValueError, "every size must be at least 1"),
        (lambda a, b: (LAYOUTS["T"](a), b), ValueError, "a must be row-major"),
        (lambda a, b: (a, LAYOUTS["T"](b)), ValueError, "b must be row-major"),
        (lambda a, b: (at_offset(a, 1), b), ValueError, "rows of a must be contiguous and 16-byte"),
        (lambda a, b: (a, b[:, :95]), ValueError, "N must be a multiple of 4"),
        (lambda a, b: (a, LAYOUTS["wide rows"](b)), ValueError, "rows of b must be contiguous"),
        (lambda a, b: (a[:, :100], b[:100]), ValueError, "K must be a multiple of "),
    ],
)
def test_what_a_file_of_aligned_operands_refuses(change, error, message, tmp_path) -> None:
    case = CASES["direct, aligned"]
    module = load(case.text, tmp_path)
    a, b = case.operands(*case.shape)
    module.matmul(a, b)
    with pytest.raises(error, match=message):
        module.matmul(*change(a, b))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("packed in one read", (70, 300, 90), "K must be at most 256"),
        ("one row", (2, 300, 37), "M must be 1"),
        ("one column", (37, 300, 2), "b must be|N must be 1"),
    ],
)
def test_what_other_files_refuse(name, shape, message, tmp_path) -> None:
    module = load(CASES[name].text, tmp_path)
    with pytest.raises(ValueError, match=message):
        module.matmul(*CASES[name].operands(*shape))


@pytest.mark.interpreted
def test_no_gradient_is_needed_where_none_is_asked_for(tmp_path) -> None:
    case = CASES["direct, aligned"]
    module = load(case.text, tmp_path)
    a, b = case.operands(*case.shape)
    want = module.matmul(a, b)
    with torch.no_grad():
        assert torch.equal(module.ModelNew()(a.requires_grad_(), b), want)


@pytest.mark.compiled
def test_compiled_kernels_refuse_cpu_tensors(tmp_path) -> None:
    case = CASES["direct"]
    module = load(case.text, tmp_path)
    with pytest.raises(RuntimeError, match="a must be on a CUDA device, got cpu"):
        module.matmul(*case.operands(*case.shape))


# Machine code


# Files that between them launch every kernel, by each of its roads.
ROADS = ("direct, fp32", "direct, split", "packed in one read", "packed, fp16, split", "mixed")
ROADS += ("packed, hi and lo", "one row, split", "one column")
COMPILED = {
    "sm_89": [*(CASES[name] for name in ROADS), SEEDS["seed, fp32, tf32, sm_89"]],
    "sm_90": [SEEDS["seed, fp32, tf32, sm_90"], SEEDS["seed, bf16, tf32, sm_90"]],
}


@pytest.mark.compiled
@pytest.mark.parametrize("arch", COMPILED)
def test_the_same_machine_code(arch, tmp_path, monkeypatch) -> None:
    """Every kernel of the files, compiled with no GPU, is instruction by instruction ours."""
    import triton

    from fastmm_op import codegen

    monkeypatch.setattr(triton.knobs.compilation, "disable_line_info", True)
    done = set()
    for case in COMPILED[arch]:
        module = load(case.text, tmp_path)
        for step in case.plan.launches:
            key = (case.arch, step.kernel, case.dtype, str(step.constexprs), step.num_warps)
            if key in done:
                continue
            done.add(key)
            ours = codegen.compile_launch(case.problem, step)
            with monkeypatch.context() as patch:
                kernel = getattr(module, f"{step.kernel}_kernel")
                patch.setitem(codegen.KERNELS, step.kernel, kernel)
                theirs = codegen.compile_launch(case.problem, step)
            assert instructions(theirs.asm["ptx"]) == instructions(ours.asm["ptx"]), key
            assert theirs.asm["cubin"] == ours.asm["cubin"], key
    if arch == "sm_89":
        elsewhere = {"gemm_hopper", "gemm_tf32_hopper", "reduce_tail", "forget"}
        assert {key[1] for key in done} == {*codegen.KERNELS} - elsewhere


def instructions(ptx: str) -> list[str]:
    """PTX without comments, which name source files."""
    return [line.split("//")[0].strip() for line in ptx.splitlines() if line.split("//")[0].strip()]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_seed_workload_on_a_gpu(arch, tmp_path) -> None:
    """KernelBench's judgement, 1e-4 absolute and relative on torch.rand; and the package's bits."""
    from fastmm_op import running

    case = Case(SEED, arch=arch)
    if case.plan.launches[-1].shared_memory > shared_memory_of_this_gpu():
        pytest.skip(f"{arch}'s plan does not fit this card")
    m, k, n = SEED
    a, b = torch.rand(m, k, device="cuda"), torch.rand(k, n, device="cuda")
    model = load(case.text, tmp_path).ModelNew().cuda()
    with torch.no_grad():
        got = model(a, b)
    assert torch.allclose(got.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-4)
    want = torch.full_like(got, torch.nan)
    running.run_plan(case.plan, a[None], b[None], want)
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_an_autotuned_file_on_a_gpu(tmp_path) -> None:
    case = Case((1021, 1031, 1033))
    a, b = (x.cuda() for x in case.operands(*case.shape))
    module = load(autotuned(case), tmp_path)
    assert torch.equal(module.matmul(a, b), load(case.text, tmp_path).matmul(a, b))
    assert module.gemm_kernel.best_config.num_stages in (1, 2, 3, 4)


@pytest.mark.gpu
def test_kernelbench_accepts_a_file_of_its_own() -> None:
    """In a process that has no package, at the seed workload and other shapes."""
    assert judge_export.main(["--arch", "sm_90"]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_packages_own_bits_on_a_gpu(case, tmp_path) -> None:
    from fastmm_op import launch, running

    if any(s.shared_memory > shared_memory_of_this_gpu() for s in case.plan.launches):
        pytest.skip("the plan does not fit this card")
    module = load(case.text, tmp_path)
    constants = [step.constexprs for step in case.plan.launches]
    for shape in (case.shape, *other_shapes(case)):
        a, b = (x.cuda() for x in case.operands(*shape))
        problem = launch.describe(a[None], b[None], case.precision, ARCHES[case.arch])
        got = module.matmul(a, b)
        want = torch.full_like(got, torch.nan)
        plan = case.plan_for(problem)
        running.run_plan(plan, a[None], b[None], want)
        # Other constants, as of a sum over splits, may add in another order.
        if shape == case.shape or [step.constexprs for step in plan.launches] == constants:
            assert torch.equal(got, want), shape
        assert_accurate(got, a, b, case.precision)


def shared_memory_of_this_gpu() -> int:
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin
