"""Devices: memory totals, free memory, and who holds it."""
