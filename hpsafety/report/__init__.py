"""Reports and model cards: HTML, figures, tables."""
