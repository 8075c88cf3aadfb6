"""A chat that goes on where it stopped, tomorrow too, without computing the conversation again.

    python examples/persistent_chat.py [model] [folder]

The conversation is kept as tokens (``conversation.json``) beside the store that keeps their attention state. Tokens
and not text: what a model generated need not be what its tokenizer makes of the text, and one token that differs
ends the shared prefix. An empty line ends the program.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from kvtier import PrefixStore, TieredCache

ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for an answer while the chat template is rendered


def user_turn(tokenizer: Any, text: str, earlier: list[int]) -> list[int]:
    """Return the tokens that follow ``earlier`` when the user says ``text`` and the model is to answer."""
    messages = [{"role": "user", "content": text}]
    if earlier:
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWER}, *messages]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    new: list[int] = tokenizer(rendered.split(ANSWER)[-1], add_special_tokens=False).input_ids
    ended = bool(earlier) and earlier[-1] == new[0]  # the answer brought its own end-of-turn token
    return new[1:] if ended else new


def main() -> None:
    """Resume the conversation in the folder, or begin one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "~/.cache/kvtier-chat").expanduser()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    saved = folder / "conversation.json"
    tokens: list[int] = json.loads(saved.read_text()) if saved.exists() else []
    if tokens:
        print(tokenizer.decode(tokens), "\n")

    with PrefixStore(folder) as store, TieredCache(store) as cache:
        while text := input("> ").strip():
            tokens += user_turn(tokenizer, text, tokens)
            prompt = torch.tensor([tokens])
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=200,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
            tokens = out[0].tolist()
            turn = cache.last_turn
            print(f"[{turn.cached_tokens} of {turn.prompt_tokens} prompt tokens were known]\n" if turn else "")
            saved.write_text(json.dumps(tokens))


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
