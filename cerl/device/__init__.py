"""The device of a run: how much memory is free, what the run needs, and whether it fits."""
