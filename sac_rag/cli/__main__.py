"""`python -m sac_rag.cli`."""

from __future__ import annotations

from sac_rag.cli import main

if __name__ == "__main__":
    main()
