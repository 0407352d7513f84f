"""The frozen language model: weights, positions, attention, encoder, digests."""
