"""Device state machines. Each is one file: registers, behaviour, ``state()`` and ``from_state()``. No I/O."""
