# Runs the same loop in ring 0 and in ring 3; the host sees where each begins and ends by an OUT. Then it spins in ring 3.
#include "machine.inc"
#include "ring3.inc"
.set MARK, 0x1000
    .code64
    .globl _start
_start:                         # by the 64-bit boot protocol
    cld
    load_ring3_tables
0:  in8 LSR                     # until a byte comes
    test $1, %al
    jz 0b
    mov $MARK, %edx
    mov $RING0_ROUNDS, %ecx
    out %al, %dx
1:  dec %ecx
    jnz 1b
    out %al, %dx
    enter_ring3 ring3
ring3:
    mov $MARK, %edx
    mov $RING3_ROUNDS, %ecx
    out %al, %dx
1:  dec %ecx
    jnz 1b
    out %al, %dx
    mov %cs, %ebx
    and $3, %bl
    add $'0', %bl
    mov $COM1, %edx
    mov %ebx, %eax
    out %al, %dx                # its privilege level
    mov $SCR, %edx
    mov $'s', %al
    out %al, %dx
    xor %eax, %eax
    in %dx, %al
    mov $COM1, %edx
    out %al, %dx
2:  jmp 2b
    ring3_tables 2
