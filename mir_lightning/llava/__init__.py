"""Parts of the pre-training recipe."""
