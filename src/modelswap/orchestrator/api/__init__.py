"""The admin API: HTTP and SSE on the orchestrator's port, and the gateways' WebSocket."""
