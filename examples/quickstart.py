"""Run this twice: the second run finds the prompt on disk and computes only what is new.

python examples/quickstart.py [model]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtier import PrefixStore, TieredCache, demo_model

name = sys.argv[1] if len(sys.argv) > 1 else demo_model()
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
rules = "\n".join(f"Rule {n}: whoever draws card {n} moves {n % 6 + 1} squares." for n in range(100))

with PrefixStore("~/.cache/kvtier-quickstart") as store, TieredCache(store) as cache:
    for question in ("Who moves furthest?", "What does card 42 do?"):
        inputs = tokenizer(f"{rules}\n\nQuestion: {question}\nAnswer:", return_tensors="pt")
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        print(tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
        turn = cache.last_turn
        print(
            f"[{turn.cached_tokens} of {turn.prompt_tokens} tokens known: {dict(turn.cached_by_tier)}]" if turn else ""
        )
