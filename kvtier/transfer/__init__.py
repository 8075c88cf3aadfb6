"""Everything that runs beside the caller: threads, and copies ordered against compute. Nothing else makes any."""

from kvtier.transfer.accelerator import StreamEngine, engine_for
from kvtier.transfer.base import CopyEngine, Fence, InlineEngine
from kvtier.transfer.cpu import ThreadEngine
from kvtier.transfer.threads import Readers
from kvtier.transfer.writer import Writer

__all__ = [
    "CopyEngine",
    "Fence",
    "InlineEngine",
    "Readers",
    "StreamEngine",
    "ThreadEngine",
    "Writer",
    "engine_for",
]
