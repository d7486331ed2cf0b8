"""Multiple-choice and open questions: items, how a model sees them, its scores and answers."""
