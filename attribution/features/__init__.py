"""Sparse features: autoencoders and transcoders that are read, searched, steered by and traced into circuits."""
