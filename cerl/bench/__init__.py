"""Measuring this machine: one file a subject, one stopwatch and one table in `clock`."""
