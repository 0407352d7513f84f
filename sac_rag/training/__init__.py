"""Fitting and training of compressors. Knows nothing of stores or retrieval.

The extra "train" is needed for training alone: `trainer` and `curves` ask for it.
"""
