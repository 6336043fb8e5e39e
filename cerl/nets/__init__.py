"""Networks of a population, whose parameters lead with [S, N]: readers, trunks and layers."""
