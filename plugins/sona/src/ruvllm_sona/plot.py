"""How learning goes, as a picture: curves from a user's logs, drawn with block characters or as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ruvllm_sona.acceptance import Tally
    from ruvllm_sona.chain import Entry
    from ruvllm_sona.records import Example

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HORIZON = 20
_ACTIONS = ("publish", "deep", "distill")
# Widths and heights of the SVG, in its own units.
_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 150, 70, 20, 30, 24


@dataclass(frozen=True)
class Curve:
    """One curve over the number of feedbacks given so far.

    Attributes:
        points: ``(feedbacks, value)``, in order.
        limit: what the gate allows; None is nothing.
        bounds: least and greatest value of the axis, where they are known.
    """

    title: str
    points: tuple[tuple[float, float], ...]
    limit: float | None = None
    bounds: tuple[float, float] | None = None

    def axis(self) -> tuple[float, float]:
        """Least and greatest value to be shown."""
        if self.bounds is not None:
            return self.bounds
        values = [value for _, value in self.points]
        low, high = min([0.0, *values]), max([0.0, *values])
        return (low, high) if high > low else (low, low + 1.0)


def curves(
    rated: Sequence[Example],
    entries: Iterable[Entry],
    limits: Mapping[str, float] | None = None,
    drafts: Sequence[Tally] = (),
) -> tuple[Curve, ...]:
    """Quality as a running mean over about 20 feedbacks, and what the gate measured of each published version.

    Where there were drafts, also how many of their tokens were right.

    Args:
        rated: all feedback, oldest first.
        entries: of the audit log.
        limits: of the gate, by the name of its figure.
        drafts: what came of them, oldest first.
    """
    quality, mean = [], 0.0
    for count, one in enumerate(rated, 1):
        mean += (one.quality - mean) / min(count, _HORIZON)
        quality.append((float(count), mean))
    times = [one.time for one in rated]

    def place(when: float) -> float:
        return float(sum(time <= when for time in times))

    published = [entry for entry in entries if entry.action in _ACTIONS]
    found = [Curve(f"quality, mean of about {_HORIZON} feedbacks", tuple(quality), bounds=(0.0, 1.0))]
    for name, title in (
        ("kl", "KL to the base model, nats a token"),
        ("mean_loss", "loss on anchor texts, nats a token"),
        ("relative_norm", "largest change of a weight, relative"),
    ):
        points = []
        for entry in published:
            value = entry.measured.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((place(entry.time), float(value)))
        found.append(Curve(title, tuple(points), (limits or {}).get(name)))
    if drafts:
        shares = tuple((place(one.time), one.accepted / one.proposed) for one in drafts)
        found.append(Curve("drafted tokens that were right", shares, bounds=(0.0, 1.0)))
    return tuple(found)


def as_text(found: Sequence[Curve], width: int = 72, height: int = 4) -> str:
    """All curves, one below the other; a column is the latest value up to there."""
    last = max([1.0, *(at for curve in found for at, _ in curve.points)])
    return "\n".join(line for curve in found for line in [*_panel(curve, last, width, height), ""])


def _panel(curve: Curve, last: float, width: int, height: int) -> list[str]:
    low, high = curve.axis()
    now = f", now {curve.points[-1][1]:.3g}" if curve.points else ", nothing yet"
    limit = f", at most {curve.limit:g}" if curve.limit is not None else ""
    columns = max(width - 10, 10)
    levels = []
    for column in range(columns):
        value = _at(curve.points, last * (column + 1) / columns)
        share = None if value is None else (min(max(value, low), high) - low) / (high - low)
        levels.append(0 if share is None else max(round(share * 8 * height), 1))
    lines = [curve.title + now + limit]
    for row in range(height - 1, -1, -1):
        label = f"{high:.3g}" if row == height - 1 else f"{low:.3g}" if not row else ""
        blocks = "".join(_BLOCKS[min(max(level - 8 * row, 0), 8)] for level in levels)
        lines.append(f"{label:>8} │{blocks}".rstrip())
    return lines


def _at(points: Sequence[tuple[float, float]], where: float) -> float | None:
    """The latest value at or before a place; None before the first."""
    return next((value for at, value in reversed(points) if at <= where), None)


def as_svg(found: Sequence[Curve], title: str) -> str:
    """All curves as an SVG image of its own."""
    last = max([1.0, *(at for curve in found for at, _ in curve.points)])
    height = _TOP + len(found) * _PANEL + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, curve in enumerate(found):
        parts += _svg_panel(curve, last, _TOP + number * _PANEL)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _svg_panel(curve: Curve, last: float, top: int) -> list[str]:
    low, high = curve.axis()
    upper, lower, right = top + 20, top + _PANEL - _BOTTOM, _WIDTH - _RIGHT

    def place(at: float, value: float) -> tuple[float, float]:
        share = (min(max(value, low), high) - low) / (high - low)
        return _LEFT + at / last * (right - _LEFT), lower - share * (lower - upper)

    dots = [place(at, value) for at, value in curve.points]
    parts = [
        f'<text x="{_LEFT}" y="{top + 13}">{escape(curve.title)}</text>',
        f'<path d="M{_LEFT} {upper}V{lower}H{right}" fill="none" stroke="#888888"/>',
        f'<text x="{_LEFT - 6}" y="{upper + 4}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 6}" y="{lower + 4}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{right}" y="{lower + 14}" text-anchor="end">{last:.0f} feedbacks</text>',
    ]
    if curve.limit is not None and low <= curve.limit <= high:
        y = place(0.0, curve.limit)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#cc3311" stroke-dasharray="4 3"/>')
    if dots:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#0077bb" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#0077bb"/>' for x, y in dots[-200:]]
    return parts


def as_html(found: Sequence[Curve], title: str, refresh_s: float | None = None) -> str:
    """A page with that image, which asks for itself again every `refresh_s` seconds."""
    again = f'<meta http-equiv="refresh" content="{refresh_s:g}">' if refresh_s else ""
    head = f'<meta charset="utf-8">{again}<title>{escape(title)}</title>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{as_svg(found, title)}</body></html>\n"
