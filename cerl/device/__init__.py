"""The device of a run: which one it is, how much memory the run needs, and whether that is free."""
