"""The services: coordinator, LMCache server, Redis; start, watch, stop."""
