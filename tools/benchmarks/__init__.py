"""What tools/benchmark.py measures: one file a job, and what they share."""
