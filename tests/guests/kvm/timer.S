# Sleeps; the local APIC's timer wakes it three times.
#include "machine.inc"
.set VECTOR, 0x40
    pvh_entry
    lidt idtr
    gate VECTOR, tick
    enable_lapic
    movl $0x0b, LAPIC + 0x3e0   # divide by 1
    movl $VECTOR, LAPIC + 0x320 # one shot
    mov $3, %ebx
1:  movl $500000, LAPIC + 0x380
    sti
    hlt
    cli
    cmp %ebx, ticks_left
    jne 2f
    exit 1                      # woken by nothing
2:  mov ticks_left, %ebx
    test %ebx, %ebx
    jnz 1b
    exit 0x33
tick:
    push %eax
    push %edx
    decl ticks_left
    putc 't'
    eoi
    pop %edx
    pop %eax
    leave_interrupt
    idt_table
    .data
ticks_left: .long 3
