"""The same training work in hpsafety and in its peers."""
