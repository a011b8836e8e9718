"""The back end of a vhost-user device: QEMU has the registers, we have the queues."""
