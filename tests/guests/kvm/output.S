# Polled output as a driver does it: 20,000 bytes that count up, a newline wherever a byte is 10.
#include "machine.inc"
    pvh_entry
    mov $20000, %ecx
    xor %ebx, %ebx
    mov $LSR, %esi
    mov $COM1, %edi
1:  mov %esi, %edx
2:  in %dx, %al
    test $0x20, %al
    jz 2b
    mov %ebx, %eax
    mov %edi, %edx
    out %al, %dx
    inc %ebx
    dec %ecx
    jnz 1b
    exit 0
