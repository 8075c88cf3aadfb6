"""How a chat begins: with its system message, or from its saved form, if that suits the model and the arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from kvtier.errors import ConfigurationError, StoreError
from kvtier.hf.cache import TieredCache
from kvtier.hf.chat.arguments import opening_text
from kvtier.hf.chat.saved import Conversation, SavedConversation
from kvtier.hf.chat.template import ChatTemplate, Message
from kvtier.hf.not_reusable import NotReusable
from kvtier.hf.turn.exclusive_use import exclusively


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What tells the model of a chat from others.

    Attributes:
        root: its root; None where nothing of it is reused.
        described: what is saved of it with a chat, in JSON types.
        vocabulary_size: the number of token ids that it has; None where its config does not say.
    """

    root: str | None
    described: Mapping[str, Any]
    vocabulary_size: int | None


def identity_of(model: PreTrainedModel, cache: TieredCache, tokenizer: Any) -> ModelIdentity:
    """Return the identity of a model whose turns run on ``cache``."""
    identity = exclusively(cache.turns, "Chat()", partial(cache.turns.identity_of, model))
    manifest = {} if isinstance(identity, NotReusable) else identity.manifest
    described = {
        "class": type(model).__name__,
        "name": str(getattr(model.config, "_name_or_path", "")),
        "vocabulary": len(tokenizer),
        "weights": manifest.get("weights"),
        "adapters": manifest.get("adapters"),
    }
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    root = None if isinstance(identity, NotReusable) else identity.root
    return ModelIdentity(root, described, size if isinstance(size, int) else None)


def opening_messages(template: ChatTemplate, system: str | None, document: str | None) -> list[Message]:
    """Return the messages that a chat begins with: its system message, or none.

    Raises:
        ConfigurationError: ``system`` or ``document`` cannot be used.
    """
    text = opening_text(system, document)
    return [] if text is None else [{"role": "system", "content": template.content(text)}]


def begun_or_resumed(
    saved: SavedConversation, opening: Sequence[Message], identity: ModelIdentity, on_other_model: str
) -> Conversation:
    """Return the saved conversation; a new one, with the messages ``opening``, where nothing is saved.

    It is that of ``identity`` from now on.

    Raises:
        ConfigurationError: the saved one has another system message, or another model with ``on_other_model="refuse"``.
        StoreError: it cannot be read, or has token ids that the model does not have.
    """
    found = saved.load()
    if found is None:
        return Conversation(opening, model=identity.described, root=identity.root)
    if opening and list(found.messages[:1]) != list(opening):
        raise ConfigurationError(
            f"the chat {saved.name!r:.80} was begun with another system message or document; leave system and "
            "document out to resume it, pass another name, or forget it first (store.forget(name))."
        )
    ours = {key: value for key, value in identity.described.items() if key != "name"}
    if {key: found.model.get(key) for key in ours} == ours:
        known = identity.vocabulary_size
        if known is not None and max(found.transcript.ids, default=0) >= known:
            raise StoreError(
                f"the chat {saved.name!r:.80} cannot be resumed: it has token ids that the model does not have; "
                "forget it, or use another name"
            )
        return replace(found, model=identity.described, root=identity.root)
    if on_other_model == "refuse":
        other = found.model.get("name") or found.model.get("class")
        raise ConfigurationError(
            f"the chat {saved.name!r:.80} was held with another model ({other}): its tokens mean nothing to this "
            "one. Pass that model, another name, or on_other_model='render' to go on from its messages."
        )
    return Conversation(found.messages, model=identity.described, root=identity.root, created_at=found.created_at)
