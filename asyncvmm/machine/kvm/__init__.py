"""The in-process machine: KVM ioctls, guest memory, vCPU threads. Facts from the kernel's KVM API documentation."""
