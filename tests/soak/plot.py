"""Curves over time, as an SVG that any browser shows."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0598bc"]
WIDTH, LEFT, RIGHT = 960, 60, 160
PANEL, GAP, TOP = 170, 46, 72


@dataclass
class Panel:
    """One diagram: a title and its curves, each a list of (seconds, value)."""

    title: str
    curves: dict[str, list[tuple[float, float]]]


def svg(title: str, panels: list[Panel], marks: list[tuple[float, str]], shades: list[tuple[float, float]]) -> str:
    """The panels below each other on one axis of time; `marks` are moments, `shades` times without load."""
    times = [at for panel in panels for curve in panel.curves.values() for at, _ in curve]
    end = max(times, default=1.0) or 1.0
    height = TOP + len(panels) * (PANEL + GAP) + 10

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * at / end

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="42" fill="#57606a">grey: without visitors; ticks at the foot: faults</text>',
    ]
    for number, panel in enumerate(panels):
        top = TOP + number * (PANEL + GAP)
        bottom = top + PANEL
        highest = max((value for curve in panel.curves.values() for _, value in curve), default=0.0)
        step = nice(highest / 4)
        highest = max(step * 4, highest)

        def y(value: float) -> float:
            return bottom - PANEL * value / highest

        for since, until in shades:
            width = x(min(until, end)) - x(since)
            out.append(f'<rect x="{x(since):.1f}" y="{top}" width="{width:.1f}" height="{PANEL}" fill="#eaeef2"/>')
        out.append(f'<text x="{LEFT}" y="{top - 6}">{escape(panel.title)}</text>')
        for line in range(5):
            at = y(line * step)
            out.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
            out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{line * step:g}</text>')
        for at, text in marks:
            out.append(f'<path d="M{x(at):.1f} {bottom}v5" stroke="#d1242f"><title>{escape(text)}</title></path>')
        for place, (name, curve) in enumerate(panel.curves.items()):
            colour = COLOURS[place % len(COLOURS)]
            points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve)
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
            row = top + 10 + 15 * place
            out.append(f'<path d="M{WIDTH - RIGHT + 12} {row - 4}h16" stroke="{colour}" stroke-width="2"/>')
            out.append(f'<text x="{WIDTH - RIGHT + 34}" y="{row}">{escape(name)}</text>')
        for tick in range(5):
            at = end * tick / 4
            out.append(f'<text x="{x(at):.1f}" y="{bottom + 18}" text-anchor="middle">{at:.0f} s</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def nice(step: float) -> float:
    """The next round number."""
    if step <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= step:
        power *= 10
    while power > step:
        power /= 10
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= step)
