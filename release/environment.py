"""A new virtual environment with one built distribution in it.

pip installs the distribution and everything it requires, with one exception: torch and the libraries of its
accelerator are linked from the running environment. They take minutes and gigabytes, and kvtier's packaging does not
touch them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import distributions
from pathlib import Path

from release.contents import CHECKOUT
from release.readme import first_snippet

_SHARED = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


class ReleaseError(Exception):
    """A distribution does not install or does not work; the message says what failed."""


class Environment:
    """A virtual environment in a folder. It shares torch with the running one, and nothing else."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, clear=True)
        self.python = folder / "bin" / "python"
        shared = folder / "shared"
        shared.mkdir()
        _link_torch(shared)
        purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        Path(purelib, "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
        self._scratch = folder / "scratch"
        self._scratch.mkdir()

    def install(self, distribution: Path, extra: str = "") -> None:
        """Install a wheel or an sdist with all that it requires, at the pinned versions."""
        pins = ["--constraint", str(CHECKOUT / "constraints.txt")]
        target = f"{distribution}[{extra}]" if extra else str(distribution)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", *pins, target]
        self._run(pip, f"pip could not install {distribution.name}")
        self._run([*pip[:5], "check"], f"{distribution.name} has requirements that do not fit each other")

    def smoke_test(self, version: str) -> None:
        """Run ``smoke.py``."""
        self._run([str(self.python), "-P", str(CHECKOUT / "release" / "smoke.py"), version], "the smoke test failed")

    def run_readme(self, readme: str, model_folder: Path) -> str:
        """Run the first snippet of the README as it stands, and return what it printed.

        Its home is new, but for the model of ``kvtier.demo_model()``, so that nothing is fetched.
        """
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            scratch = Path(name)
            snippet = scratch / "snippet.py"
            snippet.write_text(first_snippet(readme), encoding="utf-8")
            home = scratch / "home"
            cache = home / ".cache"
            cache.mkdir(parents=True)
            (cache / model_folder.parent.name).symlink_to(model_folder.parent)
            return self._run(
                [str(self.python), "-P", str(snippet)],
                "the first Python snippet of README.md failed",
                folder=scratch,
                HOME=str(home),
                XDG_CACHE_HOME=str(cache),
                HF_HUB_OFFLINE="1",
            )

    def _run(self, command: list[str], failure: str, folder: Path | None = None, **variables: str) -> str:
        """Run a command with neither the checkout nor a user's packages and store in sight."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KVTIER_"))}
        done = subprocess.run(
            command,
            cwd=folder or self._scratch,
            env={**inherited, "PYTHONNOUSERSITE": "1", **variables},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ReleaseError(f"{failure}:\n{done.stdout}{done.stderr}")
        return done.stdout


def _link_torch(shared: Path) -> None:
    """Link torch's top-level files and folders, and those of its accelerator's libraries, into ``shared``."""
    for each in distributions():
        if not _SHARED.match(each.metadata["Name"].lower()):
            continue
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            link = shared / top
            if not link.exists():
                link.symlink_to(Path(str(each.locate_file(top))))
