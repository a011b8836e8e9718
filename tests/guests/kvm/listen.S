# Says '>', then on the console each byte that it is told on COM2, which it polls for ever; ends with 0 when told a 4.
#include "machine.inc"
.set COM2, 0x2f8
    pvh_entry
    putc '>'
1:  in8 COM2 + 5
    test $1, %al
    jz 1b
    in8 COM2
    cmp $4, %al
    je 2f
    mov $COM1, %dx
    out %al, %dx
    jmp 1b
2:  exit 0
