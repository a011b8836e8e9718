# A fault with no IDT to find its handler in, nor the double fault's.
#include "machine.inc"
    pvh_entry
    putc '.'
    mov $0xfff8, %ax
    .globl fault
fault:
    mov %ax, %ds
    exit 1
