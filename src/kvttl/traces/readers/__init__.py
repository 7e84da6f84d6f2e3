"""The readers of traces: a file a format, each with what it reads and how it is known."""
