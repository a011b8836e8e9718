"""Disks of a VM on the host's side: images, copy-on-write overlays, and the thread that does their I/O."""
