"""One microbenchmark per op, in the form of case.py; bench/harness runs them: `hpsafety bench`."""
