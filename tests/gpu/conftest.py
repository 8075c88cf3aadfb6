"""Fixtures for tests on an accelerator: real hardware, or the test device with ``KVTIER_DEVICE=test``."""

from __future__ import annotations

import pytest
import torch

from tests.support.places import Place


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """The current accelerator."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        pytest.skip("no accelerator; KVTIER_DEVICE=test runs this on the test device")
    return device


@pytest.fixture
def place(accelerator: torch.device) -> Place:
    """The current accelerator, and its engines."""
    return Place.on(accelerator)
