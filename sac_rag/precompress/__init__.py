"""The offline job that compresses a corpus into a store."""
