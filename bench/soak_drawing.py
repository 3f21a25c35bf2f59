"""Draws the sizes of a soak as SVG: a panel for each size, a tick for each restart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

TITLES: Final = {
    "memory_mib": "Memory of the service (MiB)",
    "descriptors": "Open descriptors",
    "wal_mib": "Write-ahead log (MiB)",
    "database_mib": "Database (MiB)",
    "rows": "Rows of all tables",
    "folders": "Folders of runs",
}
COLUMNS: Final = 2
WIDTH, HEIGHT = 380, 130
"""Of a panel with its margins."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 22
LEGEND_HEIGHT: Final = 26
COLOURS: Final = {"SIGKILL": "kill", "SIGTERM": "stop"}
STYLE: Final = """
text { font: 11px system-ui, sans-serif; fill: #57606a }
.title { font-weight: 600; fill: #1f2328 }
.axis { stroke: #d0d7de }
.size { fill: none; stroke: #0969da; stroke-width: 1.5 }
.kill { stroke: #cf222e } .stop { stroke: #9a6700 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 } .title { fill: #f0f6fc } .axis { stroke: #3d444d }
  .size { stroke: #58a6ff } .kill { stroke: #ff7b72 } .stop { stroke: #d29922 }
}
"""


def draw(
    minutes: Sequence[float],
    series: Mapping[str, Sequence[float]],
    signals: Sequence[tuple[float, str]],
) -> str:
    """Return the drawing of sizes over time.

    Args:
        minutes: the times of the samples.
        series: the sizes, by the keys of `TITLES`.
        signals: the times of the restarts, and the signals that ended the service.
    """
    rows = -(-len(TITLES) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + LEGEND_HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f"<style>{STYLE}</style>",
    ]
    for number, (name, title) in enumerate(TITLES.items()):
        x, y = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
        lines.append(f'<g transform="translate({x} {y})">')
        lines += _panel(title, minutes, series[name], signals)
        lines.append("</g>")
    lines += [*_legend(height - 8), "</svg>", ""]
    return "\n".join(lines)


def _panel(
    title: str,
    minutes: Sequence[float],
    sizes: Sequence[float],
    signals: Sequence[tuple[float, str]],
) -> Iterator[str]:
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    highest, last = max(sizes) or 1.0, minutes[-1]
    top = highest * 1.1
    floor = TOP + inner_height

    def x_of(minute: float) -> float:
        return round(LEFT + inner_width * minute / last, 1)

    yield f'<text class="title" x="{LEFT}" y="18">{title}</text>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{LEFT + inner_width}" fill="none"/>'
    for value, y in ((max(sizes), floor - inner_height / 1.1), (0, floor)):
        label = f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"
        yield f'<text x="{LEFT - 5}" y="{y + 4:.0f}" text-anchor="end">{label}</text>'
    for minute, anchor in ((0.0, "middle"), (last / 2, "middle"), (last, "end")):
        label = f"{minute:.0f} min"
        yield f'<text x="{x_of(minute)}" y="{floor + 15}" text-anchor="{anchor}">{label}</text>'
    for signal, name in COLOURS.items():
        ticks = "".join(f"M{x_of(at)} {floor}v-5" for at, sent in signals if sent == signal)
        yield f'<path class="{name}" d="{ticks}"/>'
    points = " ".join(
        f"{x_of(at)},{floor - inner_height * size / top:.1f}"
        for at, size in zip(minutes, sizes, strict=True)
    )
    yield f'<polyline class="size" points="{points}"/>'


def _legend(y: int) -> Iterator[str]:
    for x, (signal, name) in zip((LEFT, LEFT + 120), COLOURS.items(), strict=True):
        word = "kill -9" if signal == "SIGKILL" else signal
        yield f'<path class="{name}" d="M{x} {y}v-9"/><text x="{x + 8}" y="{y}">{word}</text>'
