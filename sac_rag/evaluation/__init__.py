"""Measurements of answers: questions, scores, comparisons."""
