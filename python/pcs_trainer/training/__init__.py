"""Batches to a concept: the loop, the losses, the optimizer step, and the proofs that a run trains."""
