# Sleeps until the generic event device interrupts, says what it found there, and enters S5.
#include "machine.inc"
.set VECTOR, 0x21
.set EVENTS, 0x603
    pvh_entry
    lidt idtr
    gate VECTOR, pressed
    mask_pic
    enable_lapic
    route 1, VECTOR
    putc '>'
1:  sti
    hlt
    cli
    cmpl $0, events
    je 1b
    send events, 1
    in8 EVENTS                  # read once: gone
    mov $COM1, %dx
    out %al, %dx
    out8 0x600, 0x34
2:  hlt
    jmp 2b
pressed:
    push %eax
    push %edx
    in8 EVENTS
    mov %al, events
    eoi
    pop %edx
    pop %eax
    leave_interrupt
    idt_table
    .data
events: .long 0
