"""Compression methods, text to AnchorKV, one file each; they never import one another."""
