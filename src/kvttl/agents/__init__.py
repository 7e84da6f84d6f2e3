"""LangChain, LangGraph and AutoGen on a managed engine."""

from importlib import import_module

try:
    for _package in ("langchain_core", "langgraph"):
        import_module(_package)
except ImportError as error:
    raise ImportError(
        f"kvttl.agents needs LangChain and LangGraph ({error}): run `make install-agents`, which "
        "installs the extra kv-cache-ttl-kit[agents] with the pins of requirements-agents.txt"
    ) from error
