"""Prompts: questions and chunks to model input, and model output to text."""
