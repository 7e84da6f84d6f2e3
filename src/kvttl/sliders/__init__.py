"""Sliders over decisions and replays, for notebooks and as a page."""
