"""Scores: gradients of nodes, residual and attention attribution, ablation."""
