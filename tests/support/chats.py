"""A tokenizer whose models write tokens that it would not write itself, and chat templates of several kinds."""

from __future__ import annotations

import functools
import itertools
import string
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from tests.support import families
from tests.support.media import PLACE
from tests.support.upstream import CACHE

PAD, START, END = 0, 1, 2
VOCABULARY = 200
_SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
_LETTERS = string.ascii_letters + string.digits + " \n?!.,:;-'\"()<>|/_"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
# Shows the reasoning of the last message alone.
NO_THOUGHTS = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
DATED = "{{ today }}\n" + CHATML
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, the user first') }}{% endif %}{% endfor %}" + CHATML
)
TOOLS = "{% for tool in tools or [] %}tool {{ tool['function']['name'] }}\n{% endfor %}" + CHATML


@functools.cache
def _core() -> str:
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *_LETTERS])}
    pairs = [(a, b) for a, b in itertools.product("etaoinshr", repeat=2)] + [(a, "\n") for a in string.ascii_letters]
    merges = pairs[: VOCABULARY - len(vocabulary)]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    assert len(vocabulary) == VOCABULARY
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return str(core.to_str())


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """Letters, and pairs of letters as one token: a model that writes ``t``, ``h`` has not written ``th``."""
    core = Tokenizer.from_str(_core())
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


class PictureProcessor:
    """The processor of a tiny Llava: a picture is a seed, of which the model sees four columns."""

    chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def __init__(self) -> None:
        self.tokenizer = chat_tokenizer(self.chat_template)

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **how: Any) -> Any:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=how["add_generation_prompt"]
        )
        if not tokenize:
            return text
        parts = [part for message in messages for part in message["content"]]
        seeds = [part.get("path") or part.get("image") for part in parts if part["type"] == "image"]
        pieces = [self.tokenizer(piece, add_special_tokens=False).input_ids for piece in text.split("<image>")]
        ids = pieces[0] + [column for piece in pieces[1:] for column in [PLACE] * 4 + piece]
        pixels = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        table = torch.tensor([ids])
        return {
            "input_ids": table,
            "attention_mask": torch.ones_like(table),
            **({"pixel_values": torch.stack(pixels)} if pixels else {}),
        }


def chat_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny Llama that chats: it may end its answers."""
    made = families.build("llama", **{"vocab_size": VOCABULARY, "seed": seed, "initializer_range": 0.3, **config})
    made.generation_config.eos_token_id = END
    made.generation_config.pad_token_id = PAD
    return made


def plain_answer(model: PreTrainedModel, prompt: list[int], **settings: Any) -> list[int]:
    """The answer of plain transformers to the ids ``prompt``."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, **settings}
    cache = {CACHE: DynamicCache(config=model.config)}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **settings)
    return out[0, len(prompt) :].tolist()
