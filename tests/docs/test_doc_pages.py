"""Pages of the documentation that list others list all of them."""

import re

import kvtier
import kvtier.testing
from kvtier import progress, report
from tests.support.snippets import CHECKOUT, PAGES

DOCS = CHECKOUT / "docs"


def test_every_decision_is_in_the_index():
    listed = re.findall(r"\]\((\d{4}[\w-]+\.md)\)", (DOCS / "decisions" / "index.md").read_text())
    assert listed == sorted(path.name for path in (DOCS / "decisions").glob("0*.md"))


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for name, page in PAGES.items() if "/reference/" in name)
    listed = set(re.findall(r"^::: [\w.]*?(\w+)$", text, re.MULTILINE))
    errors = {name for name in kvtier.__all__ if name.endswith(("Error", "Warning"))}  # ::: kvtier.errors lists them
    public = {*kvtier.__all__, *report.__all__, "Bars", progress.ProgressEvent.__name__, *kvtier.testing.__all__}
    assert public - errors - {"__version__", "TurnLog"} <= listed
