"""llama-swap's ``config.yaml``: its models as ours."""
