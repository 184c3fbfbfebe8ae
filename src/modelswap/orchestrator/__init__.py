"""The control plane, port 8888: owns the scheduler, carries out its effects, serves the admin API."""
