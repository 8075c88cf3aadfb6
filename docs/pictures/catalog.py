"""All pictures, by the name of their file. A test compares each file with what its function returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.pictures import diagrams, lifecycle, results

FOLDER = Path(__file__).parents[1] / "images"
PICTURES: dict[str, Callable[[], str]] = {
    "turn": diagrams.turn,
    "tiers": diagrams.tiers,
    "chain": diagrams.chain,
    "ring": diagrams.ring,
    "lifecycle": lifecycle.drawing,
    "first-token": results.first_token,
    "break-even": results.break_even,
}
