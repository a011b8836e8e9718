"""The lab: an outer Linux under QEMU/TCG that has hardware-kind KVM. See ``scripts/lab``."""
