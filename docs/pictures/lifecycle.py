"""The life of a block, drawn from ``kvtier.store.tiers.block_states.TABLE``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from docs.pictures.canvas import DARK_INK, DARK_LINE, DARK_PAPER, INK, LINE, PAPER, TEAL
from kvtier.store.tiers.block_states import TABLE, Move, State

_WIDTH, _HEIGHT, _BOX = 860, 430, (110, 40)
_CENTRES: Mapping[State, tuple[int, int]] = {
    State.ABSENT: (100, 215),
    State.WRITING: (310, 80),
    State.READY: (560, 190),
    State.LEASED: (740, 350),
    State.LEAVING: (310, 350),
}
_STYLE = f"""
  text {{ font: 13px sans-serif; text-anchor: middle; dominant-baseline: middle; fill: {INK};
    paint-order: stroke; stroke: {PAPER}; stroke-width: 4px }}
  rect {{ fill: {TEAL}; rx: 8px }}
  .paper {{ fill: {PAPER}; rx: 0 }}
  path {{ fill: none; stroke: {LINE}; stroke-width: 1.5; marker-end: url(#arrow) }}
  polygon {{ fill: {LINE} }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: {DARK_INK}; stroke: {DARK_PAPER} }}
    .paper {{ fill: {DARK_PAPER} }}
    path {{ stroke: {DARK_LINE} }}
    polygon {{ fill: {DARK_LINE} }}
  }}
  text.state {{ font-weight: bold; fill: #fff; stroke: none }}
"""


def drawing() -> str:
    """Return the SVG."""
    arrows: dict[tuple[State, State], list[Move]] = {}
    for (source, move), target in TABLE.items():
        arrows.setdefault((source, target), []).append(move)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        "<title>The states of a block, and the moves between them</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<polygon points="0,0 8,4 0,8"/></marker></defs>',
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
    ]
    for (source, target), moves in arrows.items():
        both_ways = (target, source) in arrows
        parts += _loop(source, moves) if source is target else _arrow(source, target, moves, both_ways)
    for state, (x, y) in _CENTRES.items():
        width, height = _BOX
        parts.append(f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}"/>')
        parts.append(f'<text class="state" x="{x}" y="{y}">{state.name.lower()}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _label(x: float, y: float, moves: list[Move]) -> list[str]:
    return [
        f'<text x="{x:.0f}" y="{y + 16 * (i - (len(moves) - 1) / 2):.0f}">{escape(_words(move))}</text>'
        for i, move in enumerate(moves)
    ]


def _words(move: Move) -> str:
    return move.name.lower().replace("_", " ")


def _arrow(source: State, target: State, moves: list[Move], both_ways: bool) -> list[str]:
    """Bend an arc from one box to another aside, so that it and its counterpart lie apart."""
    (x1, y1), (x2, y2) = _CENTRES[source], _CENTRES[target]
    dx, dy = x2 - x1, y2 - y1
    length = (dx * dx + dy * dy) ** 0.5
    side = 46 if both_ways else 26
    bend_x, bend_y = (x1 + x2) / 2 - dy / length * side, (y1 + y2) / 2 + dx / length * side
    start, end = _edge((x1, y1), (bend_x, bend_y)), _edge((x2, y2), (bend_x, bend_y))
    path = f'<path d="M{start[0]:.0f},{start[1]:.0f} Q{bend_x:.0f},{bend_y:.0f} {end[0]:.0f},{end[1]:.0f}"/>'
    middle_x, middle_y = (start[0] + 2 * bend_x + end[0]) / 4, (start[1] + 2 * bend_y + end[1]) / 4
    return [path, *_label(middle_x - dy / length * 12, middle_y + dx / length * 12, moves)]


def _loop(state: State, moves: list[Move]) -> list[str]:
    x, y = _CENTRES[state]
    up = -1 if y < _HEIGHT / 2 else 1
    edge = y + up * _BOX[1] / 2
    far = edge + up * 45
    path = f'<path d="M{x - 20},{edge:.0f} C{x - 45},{far:.0f} {x + 45},{far:.0f} {x + 20},{edge:.0f}"/>'
    return [path, *_label(x, edge + up * 46, moves)]


def _edge(centre: tuple[float, float], towards: tuple[float, float]) -> tuple[float, float]:
    """Return where the line from the middle of a box to ``towards`` leaves the box."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    scale = min(_BOX[0] / 2 / abs(dx) if dx else 1e9, _BOX[1] / 2 / abs(dy) if dy else 1e9)
    return centre[0] + dx * scale, centre[1] + dy * scale
