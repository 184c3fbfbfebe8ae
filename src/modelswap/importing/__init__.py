"""From other programs' files to a config of ours: pure functions, and an account of what was left behind."""
