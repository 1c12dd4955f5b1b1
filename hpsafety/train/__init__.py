"""Optimiser steps, the loop, checkpoints, ranks, the run directory, jobs on files."""
