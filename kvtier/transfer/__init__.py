"""Threads, and copies that are ordered against compute. No other folder starts a thread or a stream."""

from kvtier.transfer.accelerator import StreamEngine, engine_for
from kvtier.transfer.base import CopyEngine, Fence, InlineEngine
from kvtier.transfer.cpu import ThreadEngine
from kvtier.transfer.engines import Engines, MakeEngine
from kvtier.transfer.threads import Readers
from kvtier.transfer.writer import Writer

__all__ = [
    "CopyEngine",
    "Engines",
    "Fence",
    "InlineEngine",
    "MakeEngine",
    "Readers",
    "StreamEngine",
    "ThreadEngine",
    "Writer",
    "engine_for",
]
