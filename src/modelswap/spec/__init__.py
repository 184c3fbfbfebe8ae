"""The config file that the user writes: its shape, its defaults, and errors that name the place."""
