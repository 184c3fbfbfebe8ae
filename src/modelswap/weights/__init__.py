"""Weights ahead of time: what a model loads, whether the Hugging Face cache has it, and fetching what is missing."""
