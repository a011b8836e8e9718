"""Snapshots: when one is taken, what is in one, and VMs made of one."""
