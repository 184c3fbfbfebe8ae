"""The whole system in virtual time: one scheduler, many gateway cores, engines; for tests and comparing policies.

`system.System` is the world and asserts after every step what must hold. `timed` drives it with latencies and
distributions, `stepped` one chosen action at a time, `explore` through every interleaving of a small world.
"""
