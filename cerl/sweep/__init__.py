"""Many runs: studies, and starting their runs on this machine."""
