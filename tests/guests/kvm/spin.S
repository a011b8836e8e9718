# Says '.' and spins without an exit.
#include "machine.inc"
    pvh_entry
    putc '.'
1:  jmp 1b
