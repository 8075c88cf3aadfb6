"""Offloading of layers that exceed their device's budget during a call, and prefetching of their pages."""
