# Two processors: the first starts the second by INIT and SIPI, each sleeps until the other's interrupt comes, then
# both write ROUNDS times to a port of their own at the same time, and the first ends the machine.
#include "machine.inc"
#include "second.inc"
.set VECTOR, 0x50
.set ROUNDS, 500
    pvh_entry
    lidt idtr
    gate VECTOR, interrupt
    enable_lapic
    start_second sipis=2
1:  cmpl $0, up                         # the second is there, with interrupts off
    je 1b
    putc '0'
    ipi 1, 0x4000 + VECTOR
2:  cli                                 # sleep until it answers
    cmpl $1, woken
    je 3f
    sti
    hlt
    jmp 2b
3:  cli
    movl $1, go
    mov $ROUNDS, %ecx
    mov $0x1000, %dx
4:  out %al, %dx
    dec %ecx
    jnz 4b
5:  cmpl $0, done
    je 5b
    putc '2'
    exit 0x44

ap:
    lidt idtr
    enable_lapic
    movl $1, up
6:  cli
    cmpl $1, woken + 4
    je 7f
    sti
    hlt
    jmp 6b
7:  cli
    putc '1'
    ipi 0, 0x4000 + VECTOR
8:  cmpl $0, go
    je 8b
    mov $ROUNDS, %ecx
    mov $0x1001, %dx
9:  out %al, %dx
    dec %ecx
    jnz 9b
    movl $1, done
10: hlt
    jmp 10b

interrupt:
    push %eax
    mov LAPIC + 0x20, %eax
    shr $24, %eax
    movl $1, woken(,%eax,4)
    eoi
    pop %eax
    leave_interrupt

    second_processor
    .data
up: .long 0
go: .long 0
done: .long 0
woken: .long 0, 0
    idt_table
