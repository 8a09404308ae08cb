"""The quality benchmark: every method on the embedded model, measured by the judge that ships with it."""
