"""Tokens per second as an SVG: a panel for each shape and case, bars by format and engine. Pure."""

from __future__ import annotations

from typing import Any

from baton.bench.engine.engines import BATON, CTRANSLATE2, LLAMA, OPENVINO, VLLM
from baton.bench.engine.shapes import FORMATS, SHAPES

CASES = ("decode-1@512", "decode-8@512", "prefill-512")
COLOURS = {
    BATON: "#2a78d6", LLAMA: "#eb6834", OPENVINO: "#1baf7a", VLLM: "#4a3aa7", CTRANSLATE2: "#eda100",
}  # fmt: skip
WIDE, HIGH, GAP, LEFT, TOP = 300, 120, 44, 20, 70
BAR, INK, FAINT = 15, "#222222", "#888888"


def draw(results: list[dict[str, Any]]) -> str:
    """With the most threads that were measured."""
    threads = max((row["threads"] for row in results), default=1)
    shown = [row for row in results if row["threads"] == threads and row["case"] in CASES]
    shapes = [name for name in SHAPES if any(row["shape"] == name for row in shown)]
    width = LEFT + len(CASES) * (WIDE + GAP)
    height = TOP + len(shapes) * (HIGH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 22, f"Tokens per second, {threads} threads: more is better", size=15),
        *_legend({row["engine"] for row in shown}),
    ]
    for down, shape in enumerate(shapes):
        for right, case in enumerate(CASES):
            x, y = LEFT + right * (WIDE + GAP), TOP + down * (HIGH + GAP)
            rows = [row for row in shown if (row["shape"], row["case"]) == (shape, case)]
            parts += _panel(x, y, f"{shape}, {case}", rows)
    return "\n".join([*parts, "</svg>\n"])


def _legend(engines: set[str]) -> list[str]:
    parts, x = [], LEFT
    for name, colour in COLOURS.items():
        if name in engines:
            label = f"{name} (bf16)" if name == VLLM else name
            parts += [_bar(x, 36, 10, 10, colour), _text(x + 14, 45, label)]
            x += 34 + 7 * len(label)
    return parts


def _panel(x: int, y: int, title: str, rows: list[dict[str, Any]]) -> list[str]:
    """Bars from zero, side by side; each has its figure above it."""
    parts = [_text(x, y + 4, title, size=12)]
    highest = max((row["rate"][1] for row in rows), default=1.0)
    floor, room = y + HIGH, HIGH - 34
    for place, format_ in enumerate(FORMATS):
        left = x + place * WIDE // len(FORMATS)
        by_engine = {row["engine"]: row["rate"] for row in rows if row["format"] == format_}
        for number, name in enumerate(name for name in COLOURS if name in by_engine):
            low, median, high = by_engine[name]
            at, tall = left + number * (BAR + 4), room * median / highest
            parts.append(
                _bar(at, floor - tall, BAR, tall, COLOURS[name], f"{name}: {low} to {high}")
            )
            parts.append(_text(at + BAR / 2, floor - tall - 4, _short(median), 8, "middle"))
        parts.append(_text(left, floor + 14, format_, colour=FAINT))
    parts.append(f'<line x1="{x}" y1="{floor}" x2="{x + WIDE}" y2="{floor}" stroke="{FAINT}"/>')
    return parts


def _short(rate: float) -> str:
    """Three digits: 97.1, 808, 2.29k, 12.6k."""
    return f"{rate:.3g}" if rate < 999.5 else f"{rate / 1e3:.3g}k"


def _bar(x: float, y: float, wide: float, high: float, colour: str, title: str = "") -> str:
    told = f"<title>{title}</title>" if title else ""
    size = f'width="{wide:g}" height="{high:.1f}"'
    return f'<rect x="{x:g}" y="{y:.1f}" {size} rx="1.5" fill="{colour}">{told}</rect>'


def _text(
    x: float, y: float, text: str, size: int = 11, anchor: str = "start", colour: str = INK
) -> str:
    place = f'x="{x:g}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{text}</text>'
