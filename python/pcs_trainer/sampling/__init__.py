"""Concepts to pictures: samplers, localized attention-guided sampling (LAG), captured attention maps."""
