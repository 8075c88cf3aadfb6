"""A hook of mkdocs: the site holds the notebooks, which lie outside of ``docs``, as files to download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_FOLDER = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, *, config: Any) -> Files:
    """Add each notebook as ``notebooks/<name>``."""
    for path in sorted(_FOLDER.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links that are right in the repository be right in the site: there, ``notebooks`` lies beside the pages."""
    return markdown.replace("](../notebooks/", "](notebooks/")
