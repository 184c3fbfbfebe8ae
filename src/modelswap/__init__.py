"""modelswap: one GPU, every model."""

__version__ = "0.1.0"
