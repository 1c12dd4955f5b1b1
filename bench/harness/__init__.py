"""The one harness of all microbenchmarks: `hpsafety bench` runs run.py, `hpsafety bench compare` compare.py."""
