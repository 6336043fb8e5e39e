"""Networks of a population: parameters lead with [S, N]; what looks at observations and rows."""
