"""The run folder: config, result rows, metrics, TensorBoard events, checkpoints, lock, console."""
