"""Fixtures for tests on an accelerator: without one, tests are skipped or use a CPU in its place."""

from __future__ import annotations

import pytest
import torch

from tests.support.places import Place


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """The current accelerator."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        pytest.skip("no accelerator")
    return device


@pytest.fixture(params=[pytest.param("accelerator", marks=pytest.mark.gpu), "stand-in"])
def place(request: pytest.FixtureRequest) -> Place:
    """The current accelerator, and a CPU in its place."""
    if request.param == "stand-in":
        return Place(torch.device("cpu"), real=False)
    return Place.on(request.getfixturevalue("accelerator"))
