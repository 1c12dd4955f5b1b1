"""Benchmarks: ops/ one op at a time, end_to_end/ against other trainers. See README.md."""
