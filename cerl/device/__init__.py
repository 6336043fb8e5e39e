"""The device of a run: which it is, how much of its memory is free, how precisely it multiplies."""
