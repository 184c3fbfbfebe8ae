"""Runtimes: what hosts an engine. Instances outlive the orchestrator and are found again by their identity."""
