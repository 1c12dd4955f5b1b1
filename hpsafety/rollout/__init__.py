"""The sampling engine over a paged cache, and scoring by two reward models."""
