"""Arguments of Chat and of its answers, refused before anything is computed or changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvtier.errors import ConfigurationError
from kvtier.hf.compat.names import CACHE_ARGUMENTS

_DOCUMENT = "Answer questions about the following text.\n\n"
_OF_THE_PROMPT = frozenset({"input_ids", "inputs", "inputs_embeds", "attention_mask", *CACHE_ARGUMENTS})
_OF_THE_TEMPLATE = frozenset({"add_generation_prompt", "conversation", "return_dict", "return_tensors", "tokenize"})


def check_model(model: Any) -> None:
    """Check that ``model`` is a model with a decoder alone.

    Raises:
        ConfigurationError: it is something else.
    """
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise ConfigurationError(f"model is a {type(model).__name__}; pass the model first, then its tokenizer.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigurationError("model: a chat needs a model with a decoder alone.")


def check_template(tools: Any, arguments: Any) -> None:
    """Check the tools and the further arguments of a chat template.

    Raises:
        ConfigurationError: the tools are no list, the arguments no mapping, or an argument is one that a chat sets.
    """
    if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence)):
        raise ConfigurationError(f"tools={tools!r:.80} is no list; pass tools=[function, …].")
    if not isinstance(arguments, Mapping):
        raise ConfigurationError(
            f"template={arguments!r:.80} is no dict of arguments of the template; a template itself is "
            "template={'chat_template': …}."
        )
    if taken := sorted(_OF_THE_TEMPLATE.intersection(arguments)):
        raise ConfigurationError(f"template: a chat sets {', '.join(taken)} itself; leave it out.")


def opening_text(system: Any, document: Any) -> str | None:
    """Return the text of the system message; None for none.

    Raises:
        ConfigurationError: ``system`` or ``document`` is no text, or ``document`` an empty one.
    """
    for name, text in (("system", system), ("document", document)):
        if text is not None and not isinstance(text, str):
            raise ConfigurationError(f"{name} is a {type(text).__name__}, no text; of a file, pass path.read_text().")
    if document is not None and not document.strip():
        raise ConfigurationError("document has no text; leave it out, or pass None.")
    parts = [] if system is None else [system]
    parts += [] if document is None else [_DOCUMENT + document]
    return "\n\n".join(parts) if parts else None


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of ``generate`` that a chat passes through.

    Raises:
        ConfigurationError: one of them is the prompt or the cache, asks for several answers, or cannot be used.
    """
    if taken := sorted(_OF_THE_PROMPT.intersection(settings)):
        raise ConfigurationError(
            f"{', '.join(taken)}: a chat passes its own prompt and cache to generate(); leave it out."
        )
    config = settings.get("generation_config")
    for answers in (settings.get("num_return_sequences"), getattr(config, "num_return_sequences", None)):
        if answers not in (None, 1):
            raise ConfigurationError("num_return_sequences: a chat has one answer at a time; use branch() for others.")
    criteria = settings.get("stopping_criteria")
    if criteria is not None and not isinstance(criteria, Sequence):
        raise ConfigurationError("stopping_criteria is no list; pass stopping_criteria=[criterion, …].")
