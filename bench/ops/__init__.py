"""One microbenchmark per op, all under one harness (harness.py); run by `hpsafety bench`."""
