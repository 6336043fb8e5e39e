"""Trains many runs: studies (named sets of presets), and the launcher for this machine."""
