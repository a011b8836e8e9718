"""The virtio socket device (virtio 1.2, section 5.10): packets, connections, their muxer, and the device. Sans-I/O."""
