"""Comparing models whose tokenizers differ: by what does not depend on how a text is cut into tokens."""
