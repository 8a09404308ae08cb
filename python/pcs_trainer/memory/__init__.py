"""What a training step needs in memory, and the fastest recomputation plans that fit a budget."""
