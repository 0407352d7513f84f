"""Measures speed and quality."""
