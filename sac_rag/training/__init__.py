"""Training of compressors. Knows nothing of stores or retrieval. Needs the extra "train"."""

from importlib.util import find_spec

if any(find_spec(name) is None for name in ("accelerate", "matplotlib")):
    raise ImportError("sac_rag.training needs the 'train' extra: pip install 'sac-rag[train]'")
