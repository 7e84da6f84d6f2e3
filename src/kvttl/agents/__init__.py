"""LangChain, LangGraph and AutoGen on a managed engine."""
