"""The snippets of the documentation: found in its pages, and what they need to run.

Comments in a page steer how its snippets are tested; `grep -rn '<!-- ' docs README.md` finds all of them:

- ``<!-- setup: text -->``: the page begins with a model, a tokenizer and inputs, of a kind in ``SETUPS``.
- ``<!-- not run: reason -->``: the next snippet is not run.
- ``<!-- prints -->``: the next block is what the snippet before it prints. With the tiny model, numbers may differ.
- ``<!-- prints with the demo model -->``: the same, compared with the demo model alone.
- ``<!-- script: name.py -->``: the next snippet is a program, run in new processes as the console block after it shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.media import PLACE, seeing

CHECKOUT = Path(__file__).parents[2]
_PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
PAGES = {page.relative_to(CHECKOUT).as_posix(): page for page in _PAGES}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)")
_COMMENT = re.compile(
    r"<!-- (?P<key>setup|not run|prints|script)(?:: (?P<value>.+?)| (?P<model>with the demo model))? -->$"
)
_VOCABULARY = 1024
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A fenced block of a page.

    Attributes:
        line: of its first line in the page, from 1.
        language: behind the opening fence.
        text: what it holds, without indentation.
        comments: the comments before it, since the last block.
    """

    line: int
    language: str
    text: str
    comments: dict[str, str]


def snippets(text: str) -> Iterator[Snippet]:
    """Yield the fenced blocks of a page."""
    comments: dict[str, str] = {}
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if found := _COMMENT.match(line.strip()):
            comments[found["key"]] = found["value"] or found["model"] or ""
        if not (fence := _FENCE.match(line)):
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner.removeprefix(fence["indent"]))
        yield Snippet(number + 1, fence["language"], "\n".join(body) + "\n", comments)
        comments = {}


def setup_of(text: str) -> str | None:
    """Return the kind of setup that a page asks for."""
    found = re.search(r"<!-- setup: (.+?) -->", text)
    return found[1] if found else None


def save_tiny_model(folder: Path) -> None:
    """Save a tiny random Llama, and a tokenizer that was trained on the documentation, for ``from_pretrained``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((page.read_text(encoding="utf-8") for page in _PAGES[:10]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|im_end|>", eos_token="<|im_end|>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=16384,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class _PictureProcessor:
    """Stands in for the processor of a tiny Llava: a picture is a seed, of which the model sees four columns."""

    def apply_chat_template(self, messages: Any, **how: Any) -> dict[str, torch.Tensor]:
        """Return the inputs for one message with a picture and words."""
        assert how == {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        seeds = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        ids = torch.tensor([[column for seed in seeds for column in [5, *[PLACE] * 4]] + list(range(10, 30))])
        pixels = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(pixels)}


def _text(folder: Path) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = tokenizer("The keeper wrote in the log book that the lamp was lit at dusk. " * 12, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    return {"torch": torch, "model": model, "tokenizer": tokenizer, "inputs": inputs}


def _pictures(folder: Path) -> dict[str, Any]:
    return {
        "torch": torch,
        "model": seeing("llava"),
        "processor": _PictureProcessor(),
        "messages": [{"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "What?"}]}],
        "question_ids": torch.arange(40, 50)[None],
        "ids": torch.arange(1, 60)[None],
    }


SETUPS: dict[str, Callable[[Path], dict[str, Any]]] = {"text": _text, "pictures": _pictures}
"""What a page may begin with, by the word in its comment. Each takes the folder of the tiny model."""
