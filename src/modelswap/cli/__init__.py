"""The command modelswap."""
