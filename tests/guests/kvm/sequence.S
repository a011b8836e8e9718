# For ever: writes a count to a register, reads it back, and sends it; ends with 1 if an access went wrong.
#include "machine.inc"
    pvh_entry
    xor %ebx, %ebx
1:  mov $SCR, %edx
    mov %ebx, %eax
    out %al, %dx
    xor %eax, %eax
    in %dx, %al
    cmp %bl, %al
    jne 2f
    mov $COM1, %edx
    out %al, %dx
    inc %ebx
    jmp 1b
2:  exit 1
