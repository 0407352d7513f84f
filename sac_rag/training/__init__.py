"""Training of compressors. Knows nothing of stores or retrieval. Needs the extra "train"."""
