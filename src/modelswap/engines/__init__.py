"""Engines: what we know of each inference server program and its HTTP API."""
