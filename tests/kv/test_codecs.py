"""Every codec passes the CodecChecks of kvtier.testing: the built-in ones, and a lossy one that a user could write."""

from __future__ import annotations

import pytest

from kvtier.kv.codecs import ExponentZstd, Raw
from kvtier.testing import CodecChecks
from tests.support.int8_codec import Int8


class TestRaw(CodecChecks):
    @pytest.fixture
    def codec(self):
        return Raw()


class TestExponentZstd(CodecChecks):
    @pytest.fixture
    def codec(self):
        return ExponentZstd()


class TestInt8(CodecChecks):
    @pytest.fixture
    def codec(self):
        return Int8()
