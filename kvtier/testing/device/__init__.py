"""A test device: the CPU's memory under another name, with the streams and the memory of an accelerator."""

from kvtier.testing.device.backend import install
from kvtier.testing.device.machine import Machine
from kvtier.testing.device.names import DEVICE_TYPE

__all__ = ["DEVICE_TYPE", "Machine", "install"]
