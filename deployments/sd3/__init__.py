"""Stable Diffusion 3 in plain torch: no Ray, no network, nothing shared between requests."""
