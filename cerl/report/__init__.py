"""From result rows of many runs to tables, statistics and figures."""
