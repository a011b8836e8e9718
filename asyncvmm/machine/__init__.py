"""The machines behind the one VM: what a backend must offer (``base``), and the two that do (``kvm``, ``qemu``)."""
