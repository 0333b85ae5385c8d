"""What a results file says: best peers, ratios, means, and the short table for a terminal."""

import math

NAME_WIDTH = 44


def is_good(row: dict) -> bool:
    """Whether the row's result passed its check and was timed."""
    return row.get("us") is not None


def label(row: dict) -> str:
    """The row's case, and its mode where that is not eager."""
    return row["case"] + ("" if row["mode"] == "eager" else f" ({row['mode']})")


def peer_us(row: dict, name: str) -> float | None:
    """A peer's time in microseconds; None if it did not run or failed."""
    return row["peers"].get(name, {}).get("us")


def best_peer(row: dict) -> tuple[str, float] | None:
    """Name and microseconds of the fastest peer that passed its check."""
    timed = [(us, name) for name in row["peers"] if (us := peer_us(row, name)) is not None]
    if not timed:
        return None
    us, name = min(timed)
    return name, us


def ratio(row: dict, name: str) -> float | None:
    """A peer's time over ours: above 1 we are faster. ``name`` may be ``"best"``."""
    us = peer_us(row, name)
    if name == "best":
        best = best_peer(row)
        us = best[1] if best else None
    return us / row["us"] if us is not None and is_good(row) else None


def losing(rows: list[dict]) -> list[dict]:
    """The rows that are slower than their best peer, slowest first."""
    slow = [row for row in rows if (ratio(row, "best") or 1.0) < 1.0]
    return sorted(slow, key=lambda row: ratio(row, "best"))


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def means(rows: list[dict]) -> dict[str, dict[str, float | int | None]]:
    """By precision class of the eager rows: how many, and geometric means of the ratios."""
    found = {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        members = [r for r in rows if r["precision"] == precision and r["mode"] == "eager"]
        entry: dict[str, float | int | None] = {"cases": len(members)}
        for name in ("torch", "best"):
            entry[name] = geometric_mean([x for r in members if (x := ratio(r, name)) is not None])
        found[precision] = entry
    return found


def failures(rows: list[dict]) -> list[str]:
    """One line for everything that failed, ours and peers'. Peers are shared by a case's modes."""
    lines = [f"{label(row)}: fastmm: {row['failed']}" for row in rows if "failed" in row]
    for row in rows:
        lines += [
            f"{row['case']}: {name}: {peer['failed']}"
            for name, peer in row["peers"].items()
            if "failed" in peer and row["mode"] == "eager"
        ]
    return lines


def number(value: float | None, form: str) -> str:
    """A value in a format, or a dash of the same width."""
    if value is not None:
        return format(value, form)
    return "-".rjust(int(form.split(".")[0] or 1))


def line(row: dict) -> str:
    """One row in at most 110 characters."""
    best = best_peer(row)
    name = label(row).replace(" (compiled)", "*")
    if len(name) > NAME_WIDTH:
        name = name[: NAME_WIDTH - 1] + "…"
    share = row["limit_fraction"]
    cells = [
        name.ljust(NAME_WIDTH),
        number(row["us"], "9.1f"),
        number(peer_us(row, "torch"), "9.1f"),
        number(best[1] if best else None, "9.1f"),
        (best[0] if best else "-")[:10].ljust(10),
        number(ratio(row, "best"), "5.2f"),
        number(100 * share if share is not None else None, "4.0f"),
        number(row["error"], "7.1e"),
    ]
    return " ".join(cells) + (" FAILED" if "failed" in row else "")


HEADING = " ".join(
    [
        "case (* = torch.compile)".ljust(NAME_WIDTH),
        "us".rjust(9),
        "torch us".rjust(9),
        "best us".rjust(9),
        "best peer".ljust(10),
        "x best".rjust(5),
        "lim%".rjust(4),
        "error".rjust(7),
    ]
)


def text(results: dict) -> str:
    """The whole summary: a line a row, means by class, losing cases, failures, what is missing."""
    rows = results["rows"]
    lines = [HEADING, *(line(row) for row in rows), ""]
    for precision, entry in means(rows).items():
        lines.append(
            f"{precision}: {entry['cases']} cases, geometric mean "
            f"{number(entry['torch'], '.2f')}x torch, {number(entry['best'], '.2f')}x best peer"
        )
    slow = losing(rows)
    lines.append(f"slower than the best peer: {len(slow)} of {len(rows)}")
    lines += [f"  {ratio(r, 'best'):.2f}x {label(r)} (best: {best_peer(r)[0]})" for r in slow]
    failed = failures(rows)
    if failed:
        lines += [f"failed: {len(failed)}", *(f"  {entry}" for entry in failed)]
    if results.get("missing"):
        lines += [f"not run: {len(results['missing'])} cases"]
        lines += [f"  {name}" for name in results["missing"]]
    return "\n".join(lines)
