"""The virtio console (virtio 1.2, section 5.3): control messages, ports as byte streams, and the device of both."""
