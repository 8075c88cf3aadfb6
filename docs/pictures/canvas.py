"""A canvas for boxes, words and arrows that becomes an SVG. The same calls give the same bytes."""

from __future__ import annotations

from html import escape

INK, PALE, LINE = "#37474f", "#eceff1", "#607d8b"
TEAL, AMBER, BLUE, GREY = "#00796b", "#ef6c00", "#1565c0", "#78909c"
_STYLE = f"""
  text {{ font: 14px sans-serif; dominant-baseline: middle; fill: {INK} }}
  .small {{ font-size: 12px }}
  .bold {{ font-weight: bold }}
  .light {{ fill: #fff }}
"""


class Canvas:
    """A white sheet of ``width`` by ``height`` units; the origin is the upper left corner.

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
            f' orient="auto"><polygon points="0,0 8,4 0,8" fill="{LINE}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
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
        border = f'stroke="{LINE}" stroke-dasharray="5 4"' if dashed else f'stroke="{LINE}"' if fill == PALE else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" {border}/>'
        )
        self.words(
            x + width / 2, y + height / 2, words, centred=True, light=fill not in (PALE, "#fff"), small=small, bold=True
        )

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
        self._parts.append(f'<path d="M{way}" fill="none" stroke="{LINE}" stroke-width="1.6"{dashes}{end}/>')

    def svg(self) -> str:
        """Return the picture."""
        return "\n".join([*self._parts, "</svg>", ""])
