"""Checks of what is published: the source distribution, the wheel and the README. ``make release-check`` runs them."""
