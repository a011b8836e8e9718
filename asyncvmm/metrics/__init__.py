"""Metrics of a VM: what its devices count, flushed as one ``metrics`` event."""
