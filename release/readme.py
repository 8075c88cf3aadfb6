"""The README as a package index shows it, and its first Python snippet."""

from __future__ import annotations

from html.parser import HTMLParser

from markdown_it import MarkdownIt


class _Targets(HTMLParser):
    """Collects the targets of links and pictures, and the anchors that a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "srcset"):
                self.found += [part.split()[0] for part in (value or "").split(",") if part.strip()]


def relative_links(markdown: str) -> list[str]:
    """Return the targets of links and pictures that a package index cannot resolve: all but ``https:`` and anchors."""
    targets = _Targets()
    targets.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return [target for target in targets.found if not target.startswith(("https://", "#", "mailto:"))]


def first_snippet(markdown: str) -> str:
    """Return the first Python code block. Raises ``ValueError`` if there is none."""
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type == "fence" and token.info.split()[:1] == ["python"]:
            return token.content
    raise ValueError("the README has no Python code block")
