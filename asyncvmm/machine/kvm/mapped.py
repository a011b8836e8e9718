"""Memory as system calls know it, by address and size: mapped memory as a memoryview, and a buffer's address."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_ssize_t, c_void_p

_PYBUF_SIMPLE, _PYBUF_WRITE = 0, 0x200

_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_from_memory.argtypes, _from_memory.restype = (c_void_p, c_ssize_t, c_int), ctypes.py_object


def mapped_view(address: int, size: int) -> memoryview:
    """The bytes there. It must be released before they are unmapped: nothing else keeps it from being used."""
    view: memoryview = _from_memory(address, size, _PYBUF_WRITE)
    return view


class _PyBuffer(ctypes.Structure):
    """Py_buffer, of the stable ABI since Python 3.11."""

    _fields_ = [
        *(("buf", c_void_p), ("obj", c_void_p), ("len", c_ssize_t), ("itemsize", c_ssize_t)),
        *(("readonly", c_int), ("ndim", c_int), ("format", c_char_p)),
        *((name, c_void_p) for name in ("shape", "strides", "suboffsets", "internal")),
    ]


_get_buffer, _release_buffer = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), c_int)
_release_buffer.argtypes, _release_buffer.restype = (ctypes.POINTER(_PyBuffer),), None


class Pinned:
    """A buffer held in its place: ``address`` is good for reading for as long as this lives."""

    def __init__(self, content: bytes | memoryview) -> None:
        """Raises BufferError for one that is not contiguous."""
        self._buffer = _PyBuffer()
        _get_buffer(content, self._buffer, _PYBUF_SIMPLE)
        self.address: int = self._buffer.buf or 0

    def __del__(self) -> None:
        _release_buffer(self._buffer)
