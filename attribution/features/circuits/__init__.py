"""Circuits: which features, errors and tokens an answer comes from, as a graph of exact linear effects.

1. `replacement`: transcoders stand in for the MLPs of one sequence; what is active, and what they leave out.
2. `rows`: the effect of everything upstream on a target, exactly, by one backward pass for many targets.
3. `influence`: how much of the logits goes back to each node; what is pruned, and two scores of the whole.
4. `trace`: logits first, then the features that matter most, as many as are asked for.
5. `check`: some of the edges, and the completeness of their targets, by really intervening.
6. `written`: the graph as JSON that circuit-tracer's and Neuronpedia's viewers read.
"""
