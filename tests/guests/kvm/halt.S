# Says '.' and sleeps for ever.
#include "machine.inc"
    pvh_entry
    putc '.'
    cli
1:  hlt
    jmp 1b
