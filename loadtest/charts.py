"""Charts as SVG, for a page that needs nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from html import escape

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 52
CROWDED = 36
"""Width of a bar's place in which a word does not fit."""
COLORS = {"dense": "#6b7280", "focus": "#2563eb"}
MORE_COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

Points = Sequence[tuple[float, float]]


def tokens(number: float) -> str:
    """Write a number of tokens: 512, 8K, 1M."""
    for unit, name in ((1024**2, "M"), (1024, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:g}"


def short(number: float) -> str:
    """Write a number in few characters: three digits count."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}" if abs(number) < 999.5 else f"{float(f'{number:.3g}'):.0f}"


def lines(
    title: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    format_x: object = short,
    reference: float | None = None,
    dashed: Set[str] = frozenset(),
) -> str:
    """Draw lines.

    Args:
        title: Above the chart.
        series: Points by name. If all begin with dense or focus, they have that side's colour.
        x_label: Below the chart.
        y_label: At its left.
        log_x: Logarithmic; positive values only, others are left out.
        log_y: The same upwards.
        x_ticks: Where to put numbers; by default at round ones.
        format_x: How to write them.
        reference: A horizontal line.
        dashed: Names whose line is dashed.
    """
    kept = {
        name: [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points] + ([reference] if reference else [])
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x, x_ticks)
    y_axis = _Axis(min(ys) if log_y else min(0, *ys), max(ys), HEIGHT - BOTTOM, TOP, log_y)
    parts = _frame(title, x_label, y_label)
    for value in x_axis.ticks:
        at = x_axis(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 16, format_x(value)))  # type: ignore[operator]
    parts += _y_grid(y_axis)
    if reference is not None:
        at = y_axis(reference)
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
    names = _colors(list(kept))
    for name, points in kept.items():
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" stroke="{names[name]}"{dash}/>')
        parts += [
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{names[name]}">'
            f"<title>{escape(name)}: {short(y)}</title></circle>"
            for x, y in points
        ]
    return _figure(parts, names, dashed)


def bars(title: str, groups: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Draw stacked bars: by bar, by part.

    Where there is no room for the names of all bars, those that begin with the same word share it, and of the
    second there is a letter; the whole name is in the bar's title.
    """
    groups = {group: parts for group, parts in groups.items() if parts}
    if not groups:
        return ""
    top = max(sum(parts.values()) for parts in groups.values())
    y_axis = _Axis(0, top, HEIGHT - BOTTOM, TOP, False)
    names = dict(
        zip(dict.fromkeys(name for parts in groups.values() for name in parts), MORE_COLORS, strict=False)
    )
    parts = [*_frame(title, "", y_label), *_y_grid(y_axis)]
    step = (WIDTH - LEFT - RIGHT) / len(groups)
    for number, (group, heights) in enumerate(groups.items()):
        left, base = LEFT + step * (number + 0.15), 0.0
        for name, height in heights.items():
            y, bottom = y_axis(base + height), y_axis(base)
            parts.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{step * 0.7:.1f}" height="{bottom - y:.1f}" '
                f'fill="{names[name]}"><title>{escape(f"{group}, {name}")}: {short(height)}</title></rect>'
            )
            base += height
    parts += _bar_names(list(groups), step)
    return _figure(parts, names)


def _bar_names(groups: Sequence[str], step: float) -> list[str]:
    crowded = step < CROWDED
    parts, shown = [], ""
    for number, group in enumerate(groups):
        first, *rest = group.split()
        middle = LEFT + step * (number + 0.5)
        if not crowded or first != shown:
            sharing = sum(other.split()[0] == first for other in groups) if crowded else 1
            parts.append(_text(middle + step * (sharing - 1) / 2, HEIGHT - BOTTOM + 16, first))
        parts += [
            _text(middle, HEIGHT - BOTTOM + 29 + 13 * row, word[:1] if crowded else word)
            for row, word in enumerate(rest)
        ]
        shown = first
    return parts


class _Axis:
    """Maps values to pixels, and has round numbers between its ends."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        log: bool,
        ticks: Sequence[float] | None = None,
    ) -> None:
        self._log = log
        if low == high:
            low, high = (low / 2, high * 2) if log else (min(low, 0), high or 1)
        if not log and ticks is None:
            step = _round_step((high - low) / 5)
            low = math.floor(low / step + 1e-9) * step
            high = math.ceil(high / step - 1e-9) * step
            ticks = [low + step * number for number in range(round((high - low) / step) + 1)]
        elif ticks is None:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            ticks = [tick for tick in ticks if low <= tick <= high] or [low, high]
        self.ticks = list(ticks)
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high = self._low, self._high
        if self._log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self._start + (value - low) / (high - low) * (self._end - self._start)


def _round_step(step: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(step))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= step - 1e-12)


def _frame(title: str, x_label: str, y_label: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 34, x_label),
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>",
    ]


def _y_grid(axis: _Axis) -> list[str]:
    parts = []
    for value in axis.ticks:
        at = axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
    return parts


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _colors(names: list[str]) -> dict[str, str]:
    """Give sides their colours, and others one each."""
    more = iter(MORE_COLORS * (1 + len(names) // len(MORE_COLORS)))
    only_sides = all(name.split()[0] in COLORS for name in names) and len({*names}) <= 4
    return {name: COLORS[name.split()[0]] if only_sides else next(more) for name in names}


def _figure(parts: list[str], names: Mapping[str, str], dashes: Set[str] = frozenset()) -> str:
    legend = "".join(
        f'<span><i{" class=dashed" if name in dashes else ""} style="background-color:{color}"></i>'
        f"{escape(name)}</span>"
        for name, color in names.items()
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
        f"<figcaption>{legend}</figcaption></figure>"
    )
