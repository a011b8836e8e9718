"""Ports of a guest's virtio console as byte streams."""
