"""An OpenAI-compatible server whose every request is managed."""
