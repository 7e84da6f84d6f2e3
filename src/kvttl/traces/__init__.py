"""Traces: what they are, and the readers of each format."""
