"""Peers: what users would pick instead of SAC, measured on the same questions and budget."""
