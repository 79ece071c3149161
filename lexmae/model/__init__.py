"""Batches of token ids to logits to sparse lexicon vectors."""
