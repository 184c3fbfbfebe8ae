"""Simulated engine and GPU, and a fake clock; users may import these too."""
