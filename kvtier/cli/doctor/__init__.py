"""``kvtier doctor``: what this machine has, how fast it is, and whether offloading works here."""
