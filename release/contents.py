"""What an sdist and a wheel contain, against what git tracks."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

CHECKOUT = Path(__file__).resolve().parent.parent
_MADE_BY_THE_BUILD = {"PKG-INFO"}


def tracked_files(checkout: Path = CHECKOUT) -> set[str]:
    """Return the files that git tracks, relative to the checkout. Deleted files that are not committed do not count."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, check=True, capture_output=True, text=True)
    return {name for name in done.stdout.split("\0") if name and (checkout / name).exists()}


def sdist_faults(sdist: Path, tracked: set[str]) -> list[str]:
    """Compare an sdist with the tracked files: tests and docs run from it, so it holds all of them, and no other."""
    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(each.name).parts[1:])) for each in archive if not each.isdir()}
    missing, foreign = tracked - names, names - tracked - _MADE_BY_THE_BUILD
    return [
        *(f"{sdist.name} lacks {name}: add its folder to the sdist's include list" for name in sorted(missing)),
        *(f"{sdist.name} holds {name}, which is not in git: commit or delete it" for name in sorted(foreign)),
    ]


def wheel_faults(wheel: Path, tracked: set[str]) -> list[str]:
    """Compare a wheel with the tracked files of ``kvtier/``. It also holds its metadata and the license, no more."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    about = f"kvtier-{version_of(wheel)}.dist-info"
    metadata = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    wanted = {name for name in tracked if name.startswith("kvtier/")} | metadata
    return [
        *(f"{wheel.name} lacks {name}" for name in sorted(wanted - names)),
        *(f"{wheel.name} holds {name}, which is not part of the library" for name in sorted(names - wanted)),
    ]


def version_of(wheel: Path) -> str:
    """Return the version in the name of a wheel: that of pyproject.toml."""
    return wheel.name.split("-")[1]


def description_of(wheel: Path) -> str:
    """Return the long description of a wheel: the Markdown text that a package index shows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode("utf-8").split("\n\n", 1)[1]
