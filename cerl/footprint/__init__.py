"""How much memory a run will take, and whether it fits beside the others on its machine."""
