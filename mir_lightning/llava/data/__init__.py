"""Samples, how they are written for a model, and batches of them."""
