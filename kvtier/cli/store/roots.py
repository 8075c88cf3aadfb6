"""Files of roots in a store: the model and the settings behind a root."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.store.tiers.disk.folder import MANIFEST_BYTES, read_record


@dataclass(frozen=True, slots=True)
class RootFile:
    """``roots/<root>.json`` of a store.

    Attributes:
        root: the root.
        manifest: the content of the file; None when the file cannot be used.
        problem: why the file cannot be used; None when it can.
    """

    root: str
    manifest: Mapping[str, Any] | None
    problem: str | None = None

    @classmethod
    def read(cls, folder: Path, root: str) -> RootFile:
        """Read the file of ``root``. A missing or damaged file raises nothing, since K and V do not need it."""
        path = folder / "roots" / f"{root}.json"
        try:
            manifest = read_record(path, MANIFEST_BYTES)
            if not isinstance(manifest, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError, RecursionError) as error:
            return cls(root, None, f"{path} cannot be read: {error}")
        return cls(root, manifest)

    @property
    def title(self) -> str:
        """The model in a few words: ``LlamaForCausalLM, 30 layers, bfloat16``."""
        if self.manifest is None:
            return f"root {self.root[:12]}"
        layers, dtype = self._setting("num_hidden_layers"), self._setting("dtype")
        parts = [
            self.manifest.get("model", f"root {self.root[:12]}"),
            f"{layers} layers" if layers is not None else None,
            dtype,
            "with adapters" if self.manifest.get("adapters") else None,
            f"namespace {self.manifest['namespace']}" if self.manifest.get("namespace") else None,
        ]
        return ", ".join(str(part) for part in parts if part)

    @property
    def name(self) -> str:
        """What the model is called, without its folder or owner; else its class; else the root."""
        called = self._setting("_model_name_or_path") or self._setting("_name_or_path")
        if isinstance(called, str) and called.strip("/\\. "):
            return re.split(r"[/\\]", called.rstrip("/\\ "))[-1]
        model = self.manifest.get("model") if self.manifest is not None else None
        return str(model) if model else f"root {self.root[:12]}"

    def _setting(self, name: str) -> Any:
        config = self.manifest.get("config") if self.manifest else None
        inner = config.get("text_config") if isinstance(config, dict) else None  # of a model with images, too
        found = [each.get(name) for each in (config, inner) if isinstance(each, dict)]
        return next((value for value in found if value is not None), None)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Facts for people: a heading and a text each."""
        if self.manifest is None:
            return [("root", self.root), ("stands for", self.problem or "")]
        found = [
            ("model", self.manifest.get("model")),
            ("called", self._setting("_model_name_or_path") or self._setting("_name_or_path")),
            ("layers", self._setting("num_hidden_layers")),
            ("dtype", self._setting("dtype")),
            ("adapters", _listed(self.manifest.get("adapters"))),
            ("namespace", self.manifest.get("namespace")),
            ("block size", f"{self.manifest['block_size']} tokens" if "block_size" in self.manifest else None),
            ("transformers", self.manifest.get("transformers")),
            ("weights", self.manifest.get("weights")),
        ]
        return [("root", self.root), *((title, str(value)) for title, value in found if value not in (None, ""))]


def _listed(value: object) -> str:
    """Return adapters in one line; an imported file may have any value here."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value or "none")
