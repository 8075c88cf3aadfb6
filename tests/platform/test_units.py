"""Parsing of byte counts and durations."""

import pytest

from kvtier.errors import ConfigurationError
from kvtier.units import parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (1, 1),
        (1048576, 1048576),
        ("17", 17),
        ("17 b", 17),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        (" 500 MB ", 500 * 10**6),
        ("1.5KiB", 1536),
        ("0.5kb", 500),
        ("3TB", 3 * 10**12),
        ("1TiB", 2**40),
    ],
)
def test_parse_bytes_accepts_numbers_and_units(written, count):
    assert parse_bytes(written, "budget") == count


@pytest.mark.parametrize(
    "wrong",
    ["12 parsecs", "", "GiB", "two", "-1", "-2GiB", "1e9", "1,5GB", "1 GiB GiB", "0x10", True, False, None, 1.5, b"1"],
)
def test_parse_bytes_refuses_invalid_counts_and_names_the_argument(wrong):
    with pytest.raises(ConfigurationError, match=r"host_budget=.* is not a byte count"):
        parse_bytes(wrong, "host_budget")


@pytest.mark.parametrize("wrong", [0, -1, -(2**40), "0", "0GiB", "0.1b"])
def test_parse_bytes_refuses_counts_below_one_byte(wrong):
    with pytest.raises(ConfigurationError, match=r"disk_budget=.* must be more than 0 bytes"):
        parse_bytes(wrong, "disk_budget")


def test_invalid_byte_count_raises_a_value_error():
    with pytest.raises(ValueError, match="parsecs"):
        parse_bytes("12 parsecs", "budget")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(90, 90), (0.5, 0.5), ("1s", 1), ("90 min", 5400), ("1.5h", 5400), ("30d", 2_592_000), (" 2 w ", 1_209_600)],
)
def test_parse_seconds_accepts_common_durations(written, seconds):
    assert parse_seconds(written, "--ttl") == seconds


@pytest.mark.parametrize("text", ["", "5", "5m", "0s", "-1d", "1e3s", "1d2h", "d", "٣d x", "1 month"])
def test_parse_seconds_refuses_invalid_durations(text):
    with pytest.raises(ConfigurationError, match=r"--ttl=.* is not a duration"):
        parse_seconds(text, "--ttl")


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), 1e13, True, None, b"1d"])
def test_parse_seconds_refuses_invalid_numbers(wrong):
    with pytest.raises(ConfigurationError, match=r"ttl=.* must be a number of seconds"):
        parse_seconds(wrong, "ttl")
