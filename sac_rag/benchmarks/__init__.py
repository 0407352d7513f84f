"""Measurements of time, bytes and rounding that anyone can repeat."""
