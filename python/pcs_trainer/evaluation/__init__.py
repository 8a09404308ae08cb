"""How good a concept is: subject fidelity, prompt fidelity, diversity, and the image encoders that judge."""
