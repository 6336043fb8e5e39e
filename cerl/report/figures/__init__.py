"""Figures of results, one file each; `cerl/report/figures/catalogue.py` lists them."""
