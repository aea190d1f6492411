"""The shared harness: tasks, baselines, metrics, measurements and reports."""
