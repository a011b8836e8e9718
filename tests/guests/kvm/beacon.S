# Writes 0, 1, 2 ... to port 0x7b for ever, as fast as it can, and each also to its neighbour in one word.
#include "machine.inc"
    pvh_entry
    xor %eax, %eax
1:  mov $0x7b, %dx
    out %al, %dx
    mov %al, %ah
    out %ax, %dx
    inc %al
    jmp 1b
