"""These tests need an accelerator; elsewhere they skip themselves."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """The current accelerator."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        pytest.skip("no accelerator")
    return device
