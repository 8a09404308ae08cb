"""Hopper's products of a warpgroup."""
