"""What a run leaves behind: its folder, rows and metrics, checkpoints, and who may write them."""
