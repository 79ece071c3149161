"""LexMAE pre-training and learned sparse retrieval on DeepSpeed."""

__version__ = "0.1.0"
