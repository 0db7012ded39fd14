"""How much each node of a circuit matters: one file for each method."""
