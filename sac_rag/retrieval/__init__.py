"""Retrieval: reads documents, splits and embeds them, searches chunks."""
