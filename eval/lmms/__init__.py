"""Public benchmarks: lmms-eval's tasks and metrics, asked through this package's own adapter."""
