"""Text to shards to batches. Imports nothing of `lexmae.model`, `lexmae.train` or `lexmae.retrieval`."""
