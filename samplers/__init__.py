"""Sampling."""
KILTER = True
