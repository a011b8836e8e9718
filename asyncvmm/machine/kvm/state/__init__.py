"""A KVM machine's state as sections of a snapshot, and back: vCPUs, VM, board, and what its CPU must be able to do."""
