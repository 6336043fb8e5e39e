"""Exchange with other programs: results and members out, curves of other programs in."""
