# Says what its time stamp counter is, five times, eight bytes and a newline each, a while apart.
#include "machine.inc"
    pvh_entry
    mov $5, %ebp
1:  mov $200, %ecx
2:  dec %ecx
    jnz 2b
    rdtsc
    mov %eax, value
    mov %edx, value + 4
    send value, 9
    dec %ebp
    jnz 1b
    exit 0
    .data
value: .quad 0
    .ascii "\n"
