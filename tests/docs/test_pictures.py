"""The pictures of the documentation are what their code draws from the code and results of today."""

from xml.etree import ElementTree

import pytest

from docs.pictures import diagrams, lifecycle
from docs.pictures.canvas import DARK_INK, DARK_PAPER
from docs.pictures.catalog import FOLDER, PICTURES
from kvtier.store.store import DEFAULT_BLOCK_SIZE
from kvtier.store.tiers.block_states import TABLE, Move, State


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_current(name):
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == PICTURES[name](), "run `python -m docs.pictures`"


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_says_what_it_shows_and_asks_no_network(name):
    svg = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    assert any(element.tag.endswith("}title") or element.tag.endswith("}text") for element in root.iter())
    assert 'href="http' not in svg


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_has_dark_colours(name):
    _, found, dark = PICTURES[name]().partition("@media (prefers-color-scheme: dark) {")
    assert found
    for colour in (DARK_PAPER, DARK_INK):
        assert f"fill: {colour}" in dark


def test_there_is_no_other_picture():
    assert {path.stem for path in FOLDER.iterdir()} == set(PICTURES)


def test_blocks_of_the_picture_have_the_size_of_blocks():
    assert f"tokens {DEFAULT_BLOCK_SIZE} – {2 * DEFAULT_BLOCK_SIZE - 1}" in diagrams.chain()


def test_lifecycle_drawing_matches_the_state_table():
    texts = [each.text for each in ElementTree.fromstring(lifecycle.drawing()).iter() if each.tag.endswith("text")]
    assert {state.name.lower() for state in State} <= set(texts)
    assert {move.name.lower().replace("_", " ") for move in Move} <= set(texts)
    assert len(texts) == len(State) + len(TABLE)
