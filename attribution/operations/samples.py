"""Samples: run the model and store its activations, and read what is stored."""
