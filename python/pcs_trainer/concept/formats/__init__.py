"""Other programs' files: what they load of a concept, and concepts read from what they wrote."""
