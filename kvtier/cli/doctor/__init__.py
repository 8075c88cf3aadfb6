"""``kvtier doctor``: hardware and transfer speeds of this machine, and a test of offloading."""
