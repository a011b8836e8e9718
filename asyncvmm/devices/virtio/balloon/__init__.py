"""The memory balloon (virtio 1.2, section 5.5): page numbers, statistics, free pages, and the device that has them."""
