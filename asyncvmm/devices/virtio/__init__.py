"""virtio devices without I/O: the transport, the split virtqueue, and what each device does with its buffers."""
