"""Tests of bench/: the harness, and the form and correctness of every case."""
