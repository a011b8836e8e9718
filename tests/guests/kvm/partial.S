# Leaves a line unfinished and spins.
#include "machine.inc"
    pvh_entry
    send text, 7
1:  jmp 1b
    .data
text: .ascii "no end!"
