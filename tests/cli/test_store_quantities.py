"""Formatting and parsing of sizes and durations on the command line."""

from __future__ import annotations

import pytest

from kvtier.cli.store.output import parse_size, span
from kvtier.errors import ConfigurationError
from kvtier.units import size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_348, "99.9 KiB"),
        (102_349, "100 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (5 * 2**30 + 2**29, "5.5 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_size_is_formatted_in_a_suitable_binary_unit(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (86399, "23 h"),
        (20.5 * 86400, "20 d"),
    ],
)
def test_duration_is_formatted_rounded_down(seconds, text):
    assert span(seconds) == text


def test_parse_size_accepts_byte_counts_and_refuses_other_text():
    assert parse_size("0", "--to") == 0
    assert parse_size("10GiB", "--to") == 10 * 2**30
    with pytest.raises(ConfigurationError, match="--to='x'"):
        parse_size("x", "--to")
