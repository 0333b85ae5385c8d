"""Choices that were measured: a small file each in the user's cache folder.

``python -m fastmm_op tune`` writes them; launch.py asks for one before it plans a new kind of call.
A file is a hint and never trusted: the choice it names is looked for among those that are legal for
the problem, and a file that is wrong in any way is ignored with one warning.

The folder holds one folder a card and version: what was measured with other kernels, another torch
or another Triton is not found. In it each problem has a file of its own, replaced whole, so that
processes that write at once neither lose nor mix anything. ``FASTMM_CACHE_DIR`` names another
folder, ``FASTMM_NO_CACHE=1`` does without.
"""

import hashlib
import json
import math
import os
import re
import threading
import warnings
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastmm_op.arch import Arch
from fastmm_op.machine import installed_version
from fastmm_op.problem import PRECISIONS, Epilogue, Operand, Problem
from fastmm_op.search import STAGES, legal
from fastmm_op.tiles import Choice

# Of the files themselves; to be raised when what they hold changes its meaning.
FORMAT = 1
# What turns a choice into machine code, relative to this file: a time measured with other kernels
# says nothing about these. Neither the driver nor the cost model is among it.
SOURCES = (
    "kernels/*.py",
    "chains.py",
    "choices.py",
    "epilogue.py",
    "kept.py",
    "launches.py",
    "multiplying.py",
    "multiplying_hopper.py",
    "packing.py",
    "partition.py",
    "plan.py",
    "shared_memory.py",
    "tile_order.py",
    "tiles.py",
)

_warned: set[Path] = set()
_warning = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """What the cache knows about a problem.

    Attributes:
        choice: the fastest that was found.
        us: its median time when it was found, microseconds.
    """

    choice: Choice
    us: float


def is_enabled() -> bool:
    """Whether FASTMM_NO_CACHE is unset (or empty, or 0)."""
    return os.environ.get("FASTMM_NO_CACHE", "") in ("", "0")


def root() -> Path | None:
    """The cache's folder, which need not exist.

    None where neither FASTMM_CACHE_DIR says it nor platformdirs is installed to ask.
    """
    if os.environ.get("FASTMM_CACHE_DIR"):
        return Path(os.environ["FASTMM_CACHE_DIR"])
    try:
        from platformdirs import user_cache_path
    except ImportError:  # a call must not fail for want of a cache
        return None
    return user_cache_path("fastmm_op")


@lru_cache
def sources_hash() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache
def environment(card: str) -> dict[str, object]:
    """What an entry must share with this process to count: all that its time depends on."""
    return {
        "format": FORMAT,
        "card": card,
        "sources": sources_hash(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
    }


def digest(data: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def folder(base: Path, card: str) -> Path:
    """Where a card's entries are: its name, and a hash of its environment."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", card)[:80]
    return base / f"{readable}-{digest(environment(card))}"


def key(problem: Problem) -> dict[str, object]:
    """What an entry is kept under: the exact problem.

    Not a class of shapes: one column more may cost alignment, a wave of tiles or a K tail, which is
    what tuning is about. Left out is what a time does not depend on: the rates of the cost model,
    and the precision of 16-bit inputs.
    """
    found = asdict(problem)
    arch = problem.arch
    copies = {"tma": arch.tma, "tma_rounds": arch.tma_rounds}
    found["arch"] = {"name": arch.name, "sms": arch.sms} | copies
    found["precision"] = problem.precision if problem.dtype == "fp32" else None
    return found


def file_name(problem: Problem) -> str:
    sizes = f"{problem.batch}x{problem.M}x{problem.K}x{problem.N}-{problem.dtype}"
    return f"{sizes}-{digest(key(problem))}.json"


@lru_cache
def files_in(path: Path) -> frozenset[str]:
    """The entries of a folder, as they were when this process first asked."""
    try:
        return frozenset(name for name in os.listdir(path) if name.endswith(".json"))
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        warn_once(path, f"fastmm_op ignores the tuned choices in {path}: {error}")
        return frozenset()


def lookup(problem: Problem, card: str) -> Entry | None:
    """What was measured for a problem on a card; None if nothing, or nothing usable, is there.

    Raises nothing, whatever the files hold. Files written after this process first asked are not
    seen, but for its own.
    """
    base = root() if is_enabled() else None
    if base is None:
        return None
    path = base
    try:
        if not base.is_dir():
            return None
        path = folder(base, card)
        entries = files_in(path)
        if not entries or file_name(problem) not in entries:
            return None
        path = path / file_name(problem)
        return read(path, problem, card)
    except (OSError, ValueError) as error:
        warn_once(path, f"fastmm_op ignores the tuned choice in {path}: {error}")
        return None


def read(path: Path, problem: Problem, card: str) -> Entry:
    """The entry in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no entry of this problem on this card that this version can use; says why.
    """
    content = parse(path)
    if content.get("environment") != environment(card):
        raise ValueError("it was written by another version or for another card")
    if content.get("problem") != key(problem):
        raise ValueError("it belongs to another problem")
    stored = content.get("choice")
    choice = next((c for c in legal(problem, STAGES) if is_written_as(c, stored)), None)
    if choice is None:
        raise ValueError(f"its choice is not legal for this problem: {stored!r:.200}")
    us = content.get("us")
    if type(us) is not float or not 0 < us < math.inf:
        raise ValueError(f"its time is no number of microseconds: {us!r:.200}")
    return Entry(choice, us)


def parse(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is not an entry: nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not an entry")
    return content


def is_written_as(value: object, data: object) -> bool:
    """Whether JSON made ``data`` of a value: dataclasses of numbers, flags and texts."""
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
        return (
            isinstance(data, dict)
            and data.keys() == set(names)
            and all(is_written_as(getattr(value, name), data[name]) for name in names)
        )
    return type(value) is type(data) and value == data


def store(problem: Problem, card: str, entry: Entry) -> Path | None:
    """Keep an entry, in place of the problem's last; None, after a warning, where that fails.

    Any number of processes may do so at once; of entries for one problem, the last one stays.
    """
    base = root()
    if base is None:
        return None
    content = {
        "environment": environment(card),
        "problem": key(problem),
        "choice": asdict(entry.choice),
        "us": entry.us,
    }
    path = folder(base, card) / file_name(problem)
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        warn_once(path, f"fastmm_op cannot keep a tuned choice in {path}: {error}")
        return None
    files_in.cache_clear()
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old one or the new one, and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def warn_once(path: Path, text: str) -> None:
    """One warning a file and process, whatever the user's filters let through."""
    with _warning:
        if path in _warned:
            return
        _warned.add(path)
    warnings.warn(text, stacklevel=2)


def survey(cards: dict[str, Arch]) -> dict[str, object]:
    """What ``doctor`` says of the cache.

    Args:
        cards: this machine's, each with the entry by which it plans.

    Returns:
        path: the folder, or None if there is no way to know it.
        enabled: whether FASTMM_NO_CACHE leaves it on.
        writable: whether this user may write there.
        valid: entries that calls on these cards would use.
        broken: files that would be ignored with a warning.
        other: files of other cards and versions, which are never opened.
    """
    base = root()
    found: dict[str, object] = {"path": base and str(base), "enabled": is_enabled()}
    if base is None:
        return found | {"writable": False, "valid": 0, "broken": 0, "other": 0}
    existing = next((p for p in (base, *base.absolute().parents) if p.exists()), base)
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    files = list(base.glob("*/*.json"))
    folders = {folder(base, card): (card, arch) for card, arch in cards.items()}
    usable = [is_valid(path, *folders[path.parent]) for path in files if path.parent in folders]
    return found | {
        "writable": writable,
        "valid": sum(usable),
        "broken": len(usable) - sum(usable),
        "other": len(files) - len(usable),
    }


def is_valid(path: Path, card: str, arch: Arch) -> bool:
    """Whether a file is the entry of the problem that it says."""
    try:
        problem = problem_of(parse(path)["problem"], arch)
        read(path, problem, card)
        return path.name == file_name(problem)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return False


def problem_of(stored: dict, arch: Arch) -> Problem:
    """The problem that ``key`` described, on a card."""
    given = stored | {
        "a": Operand(**stored["a"]),
        "b": Operand(**stored["b"]),
        "epilogue": Epilogue(**stored["epilogue"]),
        "arch": arch,
        "precision": stored["precision"] or PRECISIONS[0],
    }
    return Problem(**given)
