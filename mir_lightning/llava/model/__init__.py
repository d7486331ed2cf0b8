"""The model of a run: where it comes from, what of it trains when, and its files."""
