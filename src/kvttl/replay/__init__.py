"""Replay of traces: policies, exact engines, peers, costs and tables."""
