"""``python -m release``: build the sdist and the wheel, install each in a new environment, and try it there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvtier import demo_model
from release.contents import CHECKOUT, description_of, sdist_faults, tracked_files, version_of, wheel_faults
from release.environment import Environment, ReleaseError
from release.readme import relative_links

DIST = CHECKOUT / "dist"


def build() -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist, in ``dist/``. Returns their paths."""
    shutil.rmtree(DIST, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"the build failed:\n{done.stdout}{done.stderr}")
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def check_files(sdist: Path, wheel: Path) -> None:
    """Check what both contain, their metadata, and that the README works on a package index."""
    tracked = tracked_files()
    faults = sdist_faults(sdist, tracked) + wheel_faults(wheel, tracked)
    faults += [
        f"the description links to {link}, which no index resolves" for link in relative_links(description_of(wheel))
    ]
    if faults:
        raise ReleaseError("\n".join(faults))
    command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"twine check failed:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Run every check; the first failure ends the run with its reason."""
    sdist, wheel = build()
    check_files(sdist, wheel)
    say(f"{sdist.name} and {wheel.name}: contents, metadata and description are right")
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    model_folder = demo_model()
    for distribution in (wheel, sdist):
        with tempfile.TemporaryDirectory(prefix="kvtier-release-") as folder:
            environment = Environment(Path(folder))
            environment.install(distribution)
            environment.smoke_test(version_of(wheel))
            say(f"{distribution.name}: installs, and the smoke test passes")
            printed = environment.run_readme(readme, model_folder)
            say(f"{distribution.name}: the first snippet of README.md ran and printed\n{printed.rstrip()}")


def say(text: str) -> None:
    """Print a line of progress."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except ReleaseError as error:
        sys.exit(f"release-check: {error}")
