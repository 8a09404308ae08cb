"""The scripts that trained the embedded model. Nothing imports them."""
