"""Figures of decisions and replays, and their export."""
