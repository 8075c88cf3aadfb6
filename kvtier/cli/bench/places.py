"""Places: where K and V of a known prefix come from, each ready to answer prompts that begin with it."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvtier.cli.bench.turns import Answer, Ids, answer, load_model, new_cache
from kvtier.errors import KvtierError
from kvtier.hf.cache import TieredCache
from kvtier.hf.layers.states import has_states
from kvtier.platform.memory import free_device_bytes
from kvtier.store import PrefixStore

COLD = "cold"
PLAIN = "plain transformers, same object"
DEVICE = "kvtier, same object"
HOST = "kvtier, from RAM"
DISK = "kvtier, from files"
PROCESS = "kvtier, from files, new process"

Run = Callable[[Ids], Answer]


class WorkerError(KvtierError):
    """The new process failed; the message has what it said."""


class Places:
    """One prefix in every place.

    Each prompt must go on after the prefix with another token: a store that has seen one knows more than the prefix.
    The prefix is computed once for each cache that computes, always in one pass: equal calls give equal bits.

    Args:
        model: the model.
        name: its folder or name on the hub, for the new process.
        prefix: ids of the prefix.
        new_tokens: length of answers.
        scratch: folder for stores; the caller removes it.
        stack: closes what is opened here.

    Attributes:
        prefix_tokens: length of the prefix.
        feeds_alike: whether kvtier feeds the model as plain transformers does. Prompts of models with states are fed in
            more pieces, between which the states are kept.
    """

    def __init__(self, model: Any, name: str, prefix: Ids, new_tokens: int, scratch: Path, stack: ExitStack) -> None:
        self._model, self._name, self._new_tokens, self._scratch = model, name, new_tokens, scratch
        self.prefix_tokens = len(prefix)
        self._plain = new_cache(model)
        answer(model, self._plain, prefix, 1)
        self.feeds_alike = not any(map(has_states, self._plain.layers))
        self._same = stack.enter_context(TieredCache(stack.enter_context(PrefixStore())))
        answer(model, self._same, prefix, 1)
        self._store = stack.enter_context(PrefixStore(scratch / "seed"))
        with TieredCache(self._store) as cache:
            answer(model, cache, prefix, 1)
        self._store.flush()
        for copied in ("files", "process"):  # what one turn adds must not be known to the other
            shutil.copytree(scratch / "seed", scratch / copied)

    def runs(self, with_process: bool) -> Mapping[str, Run]:
        """Return what answers a prompt, by place."""
        runs = {COLD: self.cold, PLAIN: self.plain, DEVICE: self._device, HOST: self._host, DISK: self._disk}
        return runs | ({PROCESS: self._process} if with_process else {})

    def cold(self, prompt: Ids) -> Answer:
        """Answer with plain transformers that knows nothing, in one pass."""
        return answer(self._model, new_cache(self._model), prompt, self._new_tokens)

    def plain(self, prompt: Ids) -> Answer:
        """Answer with plain transformers that holds the prefix."""
        return answer(self._model, copy.deepcopy(self._plain), prompt, self._new_tokens)

    def _device(self, prompt: Ids) -> Answer:
        return answer(self._model, self._same, prompt, self._new_tokens)

    def _host(self, prompt: Ids) -> Answer:
        with TieredCache(self._store) as cache:
            return answer(self._model, cache, prompt, self._new_tokens)

    def _disk(self, prompt: Ids) -> Answer:
        return answer_from_files(self._model, self._scratch / "files", prompt, self._new_tokens)

    def _process(self, prompt: Ids) -> Answer:
        task, logits = self._scratch / "task.json", self._scratch / "logits.safetensors"
        fields = {"store": str(self._scratch / "process"), "prompt": prompt, "new_tokens": self._new_tokens}
        fields |= {"logits": str(logits), "device": str(self._model.device), "threads": torch.get_num_threads()}
        task.write_text(json.dumps(fields), encoding="utf-8")
        command = [sys.executable, "-m", "kvtier", "bench", self._name, "--worker", str(task)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise WorkerError(f"the new process ended with exit code {done.returncode}: {said:.300}")
        found = json.loads(done.stdout.splitlines()[-1])
        return Answer(
            tuple(found["tokens"]),
            load_file(logits)["logits"],
            found["first_token_seconds"],
            found["cached_by_tier"],
            found["miss_reason"],
        )


def answer_from_files(model: Any, folder: Path, prompt: Ids, new_tokens: int) -> Answer:
    """Answer with a store that is opened for this turn; opening it counts."""
    started_at = time.perf_counter()
    with PrefixStore(folder) as store, TieredCache(store) as cache:
        return answer(model, cache, prompt, new_tokens, started_at)


def work(name: str, task: Path) -> None:
    """Answer the prompt of ``task`` in this process, and print what came of it as one line of JSON."""
    fields = json.loads(task.read_text(encoding="utf-8"))
    torch.set_num_threads(fields["threads"])
    model = load_model(name, torch.device(fields["device"]))
    found = answer_from_files(model, Path(fields["store"]), tuple(fields["prompt"]), fields["new_tokens"])
    save_file({"logits": found.logits.contiguous()}, fields["logits"])
    kept = ("tokens", "first_token_seconds", "cached_by_tier", "miss_reason")
    sys.stdout.write(json.dumps({each: getattr(found, each) for each in kept}) + "\n")


def has_room_for_another(model: Any) -> bool:
    """Whether the model fits a second time beside itself, in a new process."""
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    return bool(free_device_bytes(model.device) > nbytes)
