"""An answer about a document whose keys and values take more memory than you give them.

    python examples/long_context.py [--model NAME] [--document FILE] [--tokens N] [--device-budget 40MB]

A document of fewer than N tokens is repeated up to there. It is read in pieces, the answer comes as it is made, and
what was on the device and what was fetched for each new token is said at the end.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from kvtier import PrefixStore, TieredCache, demo_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a name on the hub or a folder; by default SmolLM2-135M-Instruct")
parser.add_argument("--document", type=Path, help="a text file; by default the one that comes with kvtier")
parser.add_argument("--tokens", type=int, default=6000, help="repeat a shorter document up to here")
parser.add_argument("--question", default="When was the lamp lit for the first time?")
parser.add_argument("--device-budget", default="40MB", help="bytes for keys and values where the model computes")
parser.add_argument("--spill-dir", help="a folder on a disk for what does not fit")
parser.add_argument("--prefill-chunk-size", type=int, default=512, help="tokens that are fed at once")
parser.add_argument("--max-new-tokens", type=int, default=32)
args = parser.parse_args()

name = args.model or demo_model()
tokenizer = AutoTokenizer.from_pretrained(name)
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
bundled = resources.files("kvtier.cli.demo") / "lighthouse.txt"
text = args.document.read_text() if args.document else bundled.read_text()
document = tokenizer(text).input_ids
document += (document * (args.tokens // len(document)))[: max(0, args.tokens - len(document))]
prompt = torch.tensor([document + tokenizer(f"\n\nQuestion: {args.question}\nAnswer:").input_ids], device=device)
mask = torch.ones_like(prompt)

# A store keeps copies of what was computed. Where the device is the RAM, they would take what the budget saves: this
# store has room for none.
with (
    PrefixStore(host_budget=1) as store,
    TieredCache(store, device_budget=args.device_budget, spill_dir=args.spill_dir) as cache,
):
    settings = {"attention_mask": mask, "past_key_values": cache, "do_sample": False}
    model.generate(prompt, max_new_tokens=1, prefill_chunk_size=args.prefill_chunk_size, **settings)  # only reads
    reading = cache.last_turn
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(prompt, max_new_tokens=args.max_new_tokens, streamer=streamer, **settings)
    answering = cache.last_turn

each = answering.bytes_up / max(1, answering.generated_tokens) / 1e6
peak = max(reading.peak_device_bytes, answering.peak_device_bytes) / 1e6
print(f"\n{answering.hot_layers} layers were hot and {answering.cold_layers} cold after {prompt.shape[1]} tokens.")
print(f"Reading the document brought {reading.bytes_up / 1e6:.0f} MB up and {reading.bytes_down / 1e6:.0f} MB down.")
print(f"Each token of the answer brought {each:.0f} MB up; waiting took {answering.wait_seconds:.1f} s in all.")
print(f"At most {peak:.1f} MB of keys and values were on the device, within the budget of {args.device_budget}.")
