"""`python -m sac_rag.cli`. Knows nothing but where the command line begins."""

from __future__ import annotations

from sac_rag.cli import main

if __name__ == "__main__":
    main()
