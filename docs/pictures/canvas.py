"""A canvas for boxes, words and arrows that becomes an SVG. The same calls give the same bytes."""

from __future__ import annotations

from html import escape

PALE = "pale"
TEAL, AMBER, BLUE, GREY = "#00796b", "#bf4d00", "#1565c0", "#546e7a"
PAPER, INK, LINE = "#fff", "#37474f", "#607d8b"
DARK_PAPER, DARK_INK, DARK_LINE = "#1e2129", "#cfd8dc", "#90a4ae"  # the paper of the site's dark scheme
_STYLE = f"""
  text {{ font: 14px sans-serif; dominant-baseline: middle; fill: {INK} }}
  .small {{ font-size: 12px }}
  .bold {{ font-weight: bold }}
  .paper {{ fill: {PAPER} }}
  .pale {{ fill: #eceff1 }}
  .line {{ stroke: {LINE} }}
  .head {{ fill: {LINE} }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: {DARK_INK} }}
    .paper {{ fill: {DARK_PAPER} }}
    .pale {{ fill: #2e3440 }}
    .line {{ stroke: {DARK_LINE} }}
    .head {{ fill: {DARK_LINE} }}
  }}
  text.light {{ fill: #fff }}
"""


class Canvas:
    """A sheet of ``width`` by ``height`` units, white, or dark in a dark scheme; the origin is the upper left corner.

    Args:
        width: of the sheet.
        height: of the sheet.
        title: what the picture shows, in words, for readers who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><polygon points="0,0 8,4 0,8" class="head"/></marker></defs>',
            f'<rect width="{width}" height="{height}" class="paper"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        *,
        fill: str = TEAL,
        small: bool = False,
        dashed: bool = False,
    ) -> None:
        """Draw a box with ``words`` in its middle; the lines of ``words`` lie below each other."""
        is_pale = fill == PALE
        look = 'class="pale line"' if is_pale else 'class="line"' if dashed else ""
        look += "" if is_pale else f' fill="{fill}"'
        look += ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" {look.strip()}/>')
        self.words(x + width / 2, y + height / 2, words, centred=True, light=not is_pale, small=small, bold=True)

    def words(
        self,
        x: float,
        y: float,
        words: str,
        *,
        centred: bool = False,
        light: bool = False,
        small: bool = False,
        bold: bool = False,
    ) -> None:
        """Write lines of words, their middle at the height ``y``."""
        kinds = " ".join(kind for kind, is_so in (("light", light), ("small", small), ("bold", bold)) if is_so)
        lines = words.split("\n") if words else []
        for i, line in enumerate(lines):
            at = y + (15 if small else 18) * (i - (len(lines) - 1) / 2)
            anchor = ' text-anchor="middle"' if centred else ""
            self._parts.append(f'<text x="{x:g}" y="{at:g}" class="{kinds}"{anchor}>{escape(line)}</text>')

    def arrow(self, *points: tuple[float, float], dashed: bool = False, head: bool = True) -> None:
        """Draw a line through ``points``, with a head at its end."""
        way = " L".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        end = ' marker-end="url(#head)"' if head else ""
        self._parts.append(f'<path d="M{way}" fill="none" class="line" stroke-width="1.6"{dashes}{end}/>')

    def svg(self) -> str:
        """Return the picture."""
        return "\n".join([*self._parts, "</svg>", ""])
