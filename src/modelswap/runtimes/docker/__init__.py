"""The runtime that hosts engines in containers, over the Docker Engine API."""
