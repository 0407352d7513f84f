"""Measurements of time, bytes and numbers that anyone can take again."""
