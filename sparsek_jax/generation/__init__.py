"""Generation: text from a trained model in constant memory, and what it remembered of it."""
