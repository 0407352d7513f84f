"""The frozen language model: weights, positions, attention, its own encoder."""
