"""The data plane, port 8080: moves bytes between clients and the engines it holds leases on."""
