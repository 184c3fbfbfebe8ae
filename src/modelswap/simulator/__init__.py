"""Many scheduler and gateway cores in virtual time, for tests and for comparing policies."""
