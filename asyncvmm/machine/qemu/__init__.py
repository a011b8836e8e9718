"""The machine in a QEMU child: its command line, its QMP monitor, its two serial lines."""
