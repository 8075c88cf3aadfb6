"""The drawing in the documentation matches the table of block states."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

from kvtier.store.tiers.block_states import TABLE, Move, State

SCRIPT = Path(__file__).parents[2] / "docs" / "lifecycle_drawing.py"


def test_lifecycle_drawing_matches_the_state_table():
    spec = importlib.util.spec_from_file_location("lifecycle_drawing", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.DRAWING.read_text(encoding="utf-8")
    assert found == module.drawing(), "run `python docs/lifecycle_drawing.py`"
    texts = [element.text for element in ElementTree.fromstring(found).iter() if element.tag.endswith("text")]
    assert {state.name.lower() for state in State} <= set(texts)
    assert {move.name.lower().replace("_", " ") for move in Move} <= set(texts)
    assert len(texts) == len(State) + len(TABLE)
