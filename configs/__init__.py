"""Presets: one YAML file for each published experiment, stating only differences from its base."""
