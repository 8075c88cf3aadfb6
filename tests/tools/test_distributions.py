"""What the sdist and the wheel contain, what a package index shows, and the checks that `make release-check` runs."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from release.contents import CHECKOUT, description_of, sdist_faults, tracked_files, wheel_faults
from release.readme import first_snippet, relative_links

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the sdist and the wheel of the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture
def tracked():
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    # A file that is about to be committed is as good as tracked here; `make release-check` is strict.
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    return tracked_files() | {name for name in done.stdout.split("\0") if name}


def test_sdist_holds_all_tracked_files_and_no_other(built, tracked):
    assert sdist_faults(built[0], tracked) == []


def test_wheel_holds_the_library_its_metadata_and_the_license_alone(built, tracked):
    assert wheel_faults(built[1], tracked) == []


def test_description_has_no_link_that_a_package_index_cannot_resolve(built):
    description = description_of(built[1])
    assert description.startswith("# kvtier\n")
    assert relative_links(description) == []


def archive_of(path: Path, names: list[str]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name in names:
                wheel.writestr(name, "")
    else:
        with tarfile.open(path, "w:gz") as sdist:
            for name in names:
                sdist.addfile(tarfile.TarInfo(f"kvtier-1/{name}"), io.BytesIO())
    return path


def test_sdist_that_lacks_a_file_or_holds_a_foreign_one_is_a_fault(tmp_path):
    sdist = archive_of(tmp_path / "kvtier-1.tar.gz", ["PKG-INFO", "kvtier/a.py", "notes.txt"])
    assert sdist_faults(sdist, {"kvtier/a.py", "tests/b.py"}) == [
        "kvtier-1.tar.gz lacks tests/b.py: add its folder to the sdist's include list",
        "kvtier-1.tar.gz holds notes.txt, which is not in git: commit or delete it",
    ]


def test_wheel_that_lacks_a_file_or_holds_tests_is_a_fault(tmp_path):
    about = [f"kvtier-1.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")]
    wheel = archive_of(tmp_path / "kvtier-1-py3-none-any.whl", [*about, "kvtier/a.py", "tests/b.py"])
    assert wheel_faults(wheel, {"kvtier/a.py", "kvtier/py.typed", "tests/b.py"}) == [
        f"{wheel.name} lacks kvtier-1.dist-info/licenses/LICENSE",
        f"{wheel.name} lacks kvtier/py.typed",
        f"{wheel.name} holds tests/b.py, which is not part of the library",
    ]


def test_relative_links_are_found_in_markdown_and_html():
    text = (
        "[a](docs/a.md) [b](https://example.org/b) [c](#c) ![d](d.svg)\n\n"
        "| t |\n|---|\n| [e](e/) |\n\n"
        '<img src="f.svg"> <source srcset="g.svg 2x, https://example.org/h.svg">\n\n```\n[code](i.md)\n```\n'
    )
    assert relative_links(text) == ["docs/a.md", "d.svg", "e/", "f.svg", "g.svg"]


def test_first_snippet_is_the_first_python_block():
    assert first_snippet("```console\n$ a\n```\n\n```python\nb = 1\n```\n\n```python\nc = 2\n```\n") == "b = 1\n"
    with pytest.raises(ValueError, match="no Python code block"):
        first_snippet("```console\n$ a\n```\n")


def test_changelog_begins_with_the_version_of_the_project():
    heads = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (CHECKOUT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [head for head in heads if head[0] != "Unreleased"]
    assert released[0][0] == PROJECT["version"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)
    assert heads[: len(heads) - len(released)] in ([], [("Unreleased", "")])


def test_classifiers_name_the_python_versions_from_the_lowest_one_on():
    named = [c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert named == [f"3.{minor}" for minor in range(10, 10 + len(named))]
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert named[0] in admitted
    assert "3.9" not in admitted


def test_pins_satisfy_the_requirements():
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    unpinned = set()
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]
    ):
        if requirement.name in pins:
            assert pins[requirement.name] in requirement.specifier, requirement
        else:
            unpinned.add(requirement.name)
    assert unpinned <= {Requirement(each).name for extra in ("quantised", "fuzz") for each in extras[extra]}
