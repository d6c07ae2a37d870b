"""Medians, the Markdown table, and where it is put."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from density import DensityFigure
from rows import Goal, Row, Sample

BEGIN, END = "<!-- compare -->", "<!-- /compare -->"


@dataclass
class Results:
    """All samples and failures, by row and peer, in the order they were taken."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    failures: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    """Share of the processor that other programs took, a run."""

    def add(self, rows: tuple[Row, ...], peer: str, sample: Sample) -> None:
        for row in rows:
            self.samples.setdefault((row.key, peer), []).append(sample)

    def fail(self, rows: tuple[Row, ...], peer: str, reason: str) -> None:
        for row in rows:
            self.failures.setdefault((row.key, peer), []).append(reason)

    def values(self, row: str, peer: str) -> list[float]:
        return [sample.values[row] for sample in self.samples.get((row, peer), [])]

    def ratio(self, row: str, peer: str, own: str = "silo-proxy") -> float | None:
        """Median of the rounds' ratios to a peer: what slows a whole round down doesn't count."""
        theirs = {sample.turn: sample.values[row] for sample in self.samples.get((row, peer), [])}
        ours = [(sample.turn, sample.values[row]) for sample in self.samples.get((row, own), [])]
        ratios = [value / theirs[turn] for turn, value in ours if theirs.get(turn)]
        return median(ratios) if ratios else None

    def figure(self, row: str, goal: Goal) -> float | None:
        """What a goal bounds: the ratio to its peer, or silo-proxy's median."""
        if goal.peer is not None:
            return self.ratio(row, goal.peer)
        values = self.values(row, "silo-proxy")
        return median(values) if values else None

    def as_json(self) -> dict[str, object]:
        raw: dict[str, dict[str, object]] = {}
        for (row, peer), samples in self.samples.items():
            raw.setdefault(row, {})[peer] = [
                {"round": sample.turn, "value": sample.values[row], "note": sample.note, **sample.detail}
                for sample in samples
            ]
        failed = {f"{row}/{peer}": reasons for (row, peer), reasons in self.failures.items()}
        return {"rows": raw, "failures": failed, "cpu_share_of_others": self.others}


def markdown(
    facts: dict[str, str],
    rows: list[Row],
    peers: list[tuple[str, str]],
    results: Results,
    density: list[DensityFigure],
    size: str,
    share: str,
    rounds: int,
) -> str:
    """The whole block: when and where, the table, density, remarks. `peers` is keys with labels."""
    notes = Notes()
    parts = [heading(facts, results, rounds), "", table(rows, peers, results, size, share, notes)]
    if notes.lines:
        parts += ["", *notes.lines]
    parts += ["", density_table(density)]
    return "\n".join(parts)


def heading(facts: dict[str, str], results: Results, rounds: int) -> str:
    versions = [
        f"{name} {facts[name]}"
        for name in ("silo-proxy", "rathole", "nginx", "HAProxy", "wrk", "ab", "curl", "rustc")
        if name in facts
    ]
    revision = f" (commit {facts['revision']})" if "revision" in facts else ""
    text = (
        f"{facts['date']}{revision}, {facts['cpu']}, {facts['cores']} cores shared by load, proxies and"
        f" service, {facts['memory']}, Linux {facts['kernel']}; {', '.join(versions)}. Median of {rounds}"
        f" round{'s' * (rounds > 1)}, taken in turn (lowest to highest in parentheses); ratios are"
        f" the medians of the rounds' ratios."
    )
    if results.others:
        typical, most = median(results.others), max(results.others)
        text += f" Other programs took {typical:.0%} of the processor meanwhile ({most:.0%} at most)."
    return text


def table(
    rows: list[Row], peers: list[tuple[str, str]], results: Results, size: str, share: str, notes: Notes
) -> str:
    labels = [label for _, label in peers]
    lines = [
        line_of(["What", *labels, "x rathole", "x nginx", "Goal for silo-proxy", "Reached"]),
        line_of(["---"] + ["---:"] * (len(labels) + 2) + ["---", "---"]),
    ]
    for row in rows:
        cells = [cell(row, peer, results, notes) for peer, _ in peers]
        ratios = [ratio_cell(row, results, peer) for peer in ("rathole", "nginx")]
        verdict = reached(row, results)
        lines.append(line_of([row.title.format(size=size, share=share), *cells, *ratios, goal_text(row.goals), verdict]))
    return "\n".join(lines)


class Notes:
    """Numbered remarks below the table, each said once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def mark(self, text: str) -> str:
        if text not in [line.partition(" ")[2] for line in self.lines]:
            self.lines.append(f"[{len(self.lines) + 1}] {text}")
        number = [line.partition(" ")[2] for line in self.lines].index(text) + 1
        return f" [{number}]"


def cell(row: Row, peer: str, results: Results, notes: Notes) -> str:
    values = results.values(row.key, peer)
    reasons = results.failures.get((row.key, peer), [])
    if not values:
        if row.only not in (None, peer):
            return "-"
        return f"failed: {tidy(Counter(reasons).most_common(1)[0][0])}" if reasons else "not measured"
    samples = results.samples[(row.key, peer)]
    text = number(median(values), row.unit)
    if len(values) > 1:
        text += f" ({number(min(values), row.unit)} to {number(max(values), row.unit)})"
    if row.key.startswith("cpu"):
        user, kernel = (median(s.detail[part] for s in samples) for part in ("user_us", "kernel_us"))
        text += f", {user:.1f} user + {kernel:.1f} kernel"
        if "server_us" in samples[0].detail:
            text += f"; {median(s.detail['server_us'] for s in samples):.1f} of it in the server"
    if reasons:
        text += notes.mark(f"{len(reasons)} of {len(reasons) + len(values)} runs failed: {tidy(reasons[0])}.")
    if remarks := [sample.note for sample in samples if sample.note]:
        text += notes.mark(f"In {len(remarks)} of {len(samples)} runs, e.g.: {tidy(remarks[0])}.")
    return text


def number(value: float, unit: str) -> str:
    """A figure in its row's unit, with as many digits as mean something."""
    if unit == "rate":
        return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
    if unit == "us":
        if value >= 1000:
            return f"{value / 1000:.2f} ms"
        return f"{value:.1f} us" if value < 100 else f"{value:.0f} us"
    if unit == "MB/s":
        return f"{value:.0f} MB/s"
    if unit == "MiB":
        return f"{value:+.1f}"
    return f"{value:.2f}"


def ratio_cell(row: Row, results: Results, peer: str) -> str:
    """silo-proxy's figure over the peer's; growth and ratios aren't divided again."""
    ratio = None if row.unit in ("ratio", "MiB") else results.ratio(row.key, peer)
    return "-" if ratio is None else f"{ratio:.2f}"


def goal_text(goals: tuple[Goal, ...]) -> str:
    return "; ".join(goal.text().strip() for goal in goals) or "reported"


def reached(row: Row, results: Results) -> str:
    """yes, no, what must be but not the goal, or not measured; a dash without a goal."""
    if not row.goals:
        return "-"
    verdicts = [goal.reached(results.figure(row.key, goal)) for goal in row.goals]
    if None in verdicts:
        return "not measured"
    if all(verdicts):
        return "yes"
    musts = [verdict for goal, verdict in zip(row.goals, verdicts) if goal.word == "must"]
    return "what must be, not the goal" if musts and all(musts) else "no"


def density_table(figures: list[DensityFigure]) -> str:
    lines = [
        line_of(["Density: many agents on one server", "silo-proxy", "Goal", "Reached"]),
        line_of(["---", "---:", "---", "---"]),
    ]
    for figure in figures:
        measured = figure.text or f"not measured: {tidy(figure.reason)}"
        verdict = "-" if not figure.goal else "not measured" if figure.reached is None else (
            "yes" if figure.reached else "no"
        )
        lines.append(line_of([figure.title, measured, figure.goal or "reported", verdict]))
    return "\n".join(lines)


def line_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def tidy(text: str) -> str:
    """A reason fit for a table cell: one line, no bars, no colours, no full stop."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return re.sub(r"\s+", " ", text).replace("|", "/").strip().rstrip(".")


def has_block(file: Path, marks: tuple[str, str] = (BEGIN, END)) -> bool:
    """Whether the file has the two marks, in order."""
    begin, end = marks
    text = file.read_text() if file.is_file() else ""
    return 0 <= text.find(begin) < text.find(end)


def replace_block(file: Path, block: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Puts the block between the two marks of the file."""
    begin, end = marks
    text = file.read_text()
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    file.write_text(f"{head}{begin}\n{block}\n{end}{tail}")
