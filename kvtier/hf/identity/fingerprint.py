"""Fingerprint: model → root, a hash of everything besides tokens that decides K and V."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import transformers
from transformers import PreTrainedModel

from kvtier.hf.identity.contents import config_values
from kvtier.hf.identity.eligibility import used_hooks, why_unsound
from kvtier.hf.identity.module_walk import ModelWalk
from kvtier.hf.identity.numerics import settings
from kvtier.hf.identity.stable_repr import Undescribable, describe
from kvtier.hf.identity.trusted_hooks import NO_HOOKS, TrustedHooks
from kvtier.hf.identity.weights.digest import Unread, digest_weights
from kvtier.hf.not_reusable import NotReusable
from kvtier.store.format.block_file import FORMAT_VERSION

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """A root, and a manifest that describes it."""

    root: str
    manifest: Mapping[str, Any]


def identify(
    model: PreTrainedModel,
    namespace: str,
    block_size: int,
    tokens: npt.ArrayLike = (),
    lossy_codec: str | None = None,
    lossy_page_codec: str | None = None,
    *,
    has_windows: bool = False,
    trusted_hooks: TrustedHooks = NO_HOOKS,
) -> Identity | NotReusable:
    """Return the identity of ``model`` as it is now, or why its K and V must not be reused.

    Called every turn, so that a training step, an adapter switch or an edited config gives another root. The root
    covers the config; class, forward function and attributes of every module; names, shapes, dtypes and values of all
    tensors (``weights/digest.py`` says which edits between two turns of a process can be missed); active, merged and
    disabled adapters of every kind, and their scaling; attention and expert implementations; autocast and PyTorch's
    precision settings (``numerics.py``); the minor version of transformers; namespace and block size; the names of
    a store's codec and of a codec of cold pages that lose bits; whether the pages of sliding layers are stored in
    blocks of their own (``has_windows``); the names of the ``trusted_hooks`` that the model has. It is equal in every
    process and on every device.

    ``tokens`` are not part of the root: their embedding rows are checked for edits that PyTorch does not count.

    For user code, the root covers the code and all that it reads; for released packages, versions and patches
    (``patches.py``). Attributes that no code of the model names are not covered (``attribute_reads.py``). A value
    without a description, and any exception from the model's code, is a reason not to reuse.
    """
    codecs = {"codec": lossy_codec, "page_codec": lossy_page_codec}
    of_cache = {"namespace": namespace, "block_size": block_size, **{k: v for k, v in codecs.items() if v is not None}}
    of_cache |= {"windows": "apart"} if has_windows else {}
    try:
        return _identify(model, tokens, of_cache, trusted_hooks)
    except Undescribable as reason:
        return NotReusable(f"what the model computes with is not known: {reason}", lasts=True)
    except Exception as error:  # from any code that the model holds: it must not end a generate()
        _log.debug("identifying %s failed", type(model).__name__, exc_info=True)
        return NotReusable(f"the model cannot be identified: {_said(error)}", lasts=True)


def _said(error: Exception) -> str:
    try:
        text = str(error).partition("\n")[0]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _identify(
    model: PreTrainedModel, tokens: npt.ArrayLike, of_cache: Mapping[str, object], trusted_hooks: TrustedHooks
) -> Identity | NotReusable:
    walk = ModelWalk(model)
    unsound = why_unsound(model, walk, trusted_hooks)
    if unsound is not None:
        return unsound
    weights = digest_weights(model, walk.tensors, tokens)
    if isinstance(weights, Unread):
        return NotReusable(f"the values of {weights.name} cannot be read: {weights.error}", lasts=True)
    hooks = used_hooks(walk, trusted_hooks)
    values = config_values(model.config)
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": _readable(values),
        "config_digest": hashlib.sha256(describe(values, "config", []).encode()).hexdigest(),
        "attention": walk.attention,
        "modules": hashlib.sha256("\n".join(walk.text).encode()).hexdigest(),
        "weights": weights,
        "adapters": _adapters(walk),
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
        "torch": settings(),
        **of_cache,
        **({"trusted_hooks": hooks} if hooks else {}),
    }
    text = json.dumps({name: value for name, value in manifest.items() if name != "config"}, sort_keys=True)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), MappingProxyType(manifest))


def _readable(value: Any) -> Any:
    """Return a config's values as JSON types, for readers of the manifest: the root uses the digest instead."""
    if isinstance(value, Mapping):
        return {str(key): _readable(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(inside) for inside in value]
    return value if type(value) in (bool, int, float, str, type(None)) else type(value).__qualname__


def _adapters(walk: ModelWalk) -> list[str]:
    """Return each combination of active, merged and disabled adapters and scaling (PEFT's attribute names)."""
    found = set()
    for part in walk.parts:
        if "_active_adapter" in part.attributes or "_disable_adapters" in part.attributes:
            module: Any = part.module
            state = {
                "active": getattr(module, "_active_adapter", None),
                "scaling": getattr(module, "scaling", None),
                "merged": getattr(module, "merged_adapters", None),
                "disabled": getattr(module, "_disable_adapters", None),
            }
            found.add(f"{type(module).__name__} {describe(state, 'an adapter', [])}")
    return sorted(found)
