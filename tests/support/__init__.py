"""Shared helpers of the tests: tiny models, stores with known bytes, faults, interrupts."""
