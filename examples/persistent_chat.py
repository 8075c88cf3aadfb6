"""A chat that goes on where it stopped, tomorrow too, without computing the conversation again.

    python examples/persistent_chat.py [model] [folder]

The store in the folder keeps messages, tokens and attention state under the name "example". Ctrl-C stops an answer, an
empty line ends the program. ``kvtier chat`` is this program with commands.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtier import Chat, demo_model


def main() -> None:
    """Resume the conversation in the folder, or begin one."""
    name = sys.argv[1] if len(sys.argv) > 1 else demo_model()
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "~/.cache/kvtier-chat").expanduser()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")

    with Chat(model, tokenizer, cache=folder, name="example", max_new_tokens=200) as chat:
        for message in chat.messages:
            print(f"{message['role']}: {message['content']}\n")
        while text := input("> ").strip():
            try:
                chat.say(text, stream=True)
            except KeyboardInterrupt:
                print(" …")
                continue
            turn = chat.last_turn
            print(f"[{turn.cached_tokens} of {turn.prompt_tokens} prompt tokens were known]\n" if turn else "")


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
