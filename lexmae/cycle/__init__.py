"""The whole cycle of a pipeline recipe: which commands, in what order, and what they came to."""
