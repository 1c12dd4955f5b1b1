"""Trials: what a stage learns on real data, not how fast it is. See ../README.md."""
