# Ends itself by one OUT: of VALUE to PORT.
#include "machine.inc"
    pvh_entry
    putc '.'
    out8 PORT, VALUE
9:  hlt
    jmp 9b
