"""LangChain components over sac_rag. Nothing is here yet: use `sac_rag.SacRAG` directly."""
