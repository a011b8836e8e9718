# Writes to the console as fast as it can, for ever.
#include "machine.inc"
    pvh_entry
    mov $COM1, %edx
    mov $'x', %al
1:  out %al, %dx
    jmp 1b
