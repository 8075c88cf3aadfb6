"""Machines by name: figures from their data sheets, for predictions without the machine."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.errors import ConfigurationError

# Lanes of PCI Express carry 985 MB/s (3.0), 1.97 GB/s (4.0) and 3.94 GB/s (5.0) in one direction (PCI-SIG, after line
# coding). Copies of pinned memory reach about four fifths of it: packets have headers.
_PCIE_3, _PCIE_4, _PCIE_5 = 15.75e9, 31.5e9, 63.0e9  # 16 lanes

DISK_BYTES_PER_SECOND = 3e9
"""What a common NVMe drive on PCI Express 3.0 or 4.0 reads in sequence."""


@dataclass(frozen=True, slots=True)
class Machine:
    """An accelerator as its data sheet describes it.

    Attributes:
        name: as it is written on the command line, in any case and with or without spaces.
        peak_operations_per_second: dense matrix products in fp16 or bf16 with sums in fp32.
        memory_bytes_per_second: of its own memory.
        memory_bytes: of its own memory.
        link_peak_bytes_per_second: from the host, in one direction.
        utilisation: the share of the peak that a prefill reaches.
        link_share: the share of the link that copies of pinned memory reach.
    """

    name: str
    peak_operations_per_second: float
    memory_bytes_per_second: float
    memory_bytes: float
    link_peak_bytes_per_second: float
    utilisation: float = 0.45
    link_share: float = 0.79

    @property
    def operations_per_second(self) -> float:
        """What a prefill reaches."""
        return self.peak_operations_per_second * self.utilisation

    @property
    def link_bytes_per_second(self) -> float:
        """What copies of pinned host memory reach."""
        return self.link_peak_bytes_per_second * self.link_share


# The utilisation is an assumption: long prompts of dense models reach 0.4 to 0.5 of the dense peak. For cards before
# Ampere, which have no asynchronous copies into shared memory, 0.4.
MACHINES = (
    # NVIDIA Tesla V100 data sheet (SXM2 32 GB); no bf16.
    Machine("V100", 125e12, 900e9, 32e9, _PCIE_3, 0.40),
    # NVIDIA T4 data sheet; no bf16.
    Machine("T4", 65e12, 320e9, 16e9, _PCIE_3, 0.40),
    # NVIDIA Ampere GA102 white paper, fp16 with sums in fp32.
    Machine("RTX 3090", 71e12, 936e9, 24e9, _PCIE_4),
    # NVIDIA Ada GPU architecture white paper, fp16 with sums in fp32.
    Machine("RTX 4090", 165.2e12, 1008e9, 24e9, _PCIE_4),
    # NVIDIA RTX Blackwell GPU architecture white paper, fp16 with sums in fp32.
    Machine("RTX 5090", 209.5e12, 1792e9, 32e9, _PCIE_5),
    # NVIDIA A10 data sheet.
    Machine("A10", 125e12, 600e9, 24e9, _PCIE_4),
    # NVIDIA L4 data sheet, which gives twice as much with sparsity.
    Machine("L4", 121e12, 300e9, 24e9, _PCIE_4),
    # NVIDIA L40S data sheet.
    Machine("L40S", 362e12, 864e9, 48e9, _PCIE_4),
    # NVIDIA A100 data sheet (SXM 80 GB).
    Machine("A100", 312e12, 2039e9, 80e9, _PCIE_4),
    # NVIDIA H100 data sheet (SXM), which gives twice as much with sparsity.
    Machine("H100", 989.4e12, 3350e9, 80e9, _PCIE_5),
    # NVIDIA H200 data sheet (SXM).
    Machine("H200", 989.4e12, 4800e9, 141e9, _PCIE_5),
    # NVIDIA DGX B200 data sheet, an eighth of the system and half of its figure with sparsity.
    Machine("B200", 2250e12, 8000e9, 180e9, _PCIE_5),
    # AMD Instinct MI300X data sheet.
    Machine("MI300X", 1307e12, 5300e9, 192e9, _PCIE_5),
)


def named_machine(name: str) -> Machine:
    """Return the machine called ``name``: ``H100``, ``h100``, ``RTX 4090``, ``rtx4090``, ``4090``.

    Raises:
        ConfigurationError: none is; the message lists all.
    """
    wanted = _plain(name)
    for machine in MACHINES:
        if wanted in (_plain(machine.name), _plain(machine.name).removeprefix("rtx")):
            return machine
    known = ", ".join(machine.name for machine in MACHINES)
    raise ConfigurationError(f"device={name!r:.80} is not known; pass here, cpu or one of {known}.")


def _plain(name: str) -> str:
    return "".join(each for each in name.lower() if each.isalnum())
