"""Finding chunks: splitting, embedding, searching, reading documents."""
