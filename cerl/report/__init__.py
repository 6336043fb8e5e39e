"""Reads the result rows of many runs and makes tables, statistics and figures of them."""
