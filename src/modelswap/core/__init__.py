"""Decisions, pure: no I/O, no clock of its own, no randomness."""
