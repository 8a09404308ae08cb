"""The embedded model: a procedural world, its captions and subjects, the weights, and a judge trained apart."""
