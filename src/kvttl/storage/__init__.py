"""Sealed values and Redis connections of the backends."""
