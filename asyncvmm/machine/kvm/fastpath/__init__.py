"""The native run loop for a polled serial port: its C source, its prebuilt library, and what drives it from Python."""
