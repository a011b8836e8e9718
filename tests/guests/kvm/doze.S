# Dozes for ROUNDS rounds. The local APIC's timer wakes it, one shot, set a little later each time up to LATEST and then
# anew: before STI, behind it, behind HLT. What is lost once is lost for good: nothing else wakes it.
#include "machine.inc"
.set VECTOR, 0x40
.set ROUNDS, 3000
.set STEP, 137                  # nanoseconds
.set LATEST, 200000

    pvh_entry
    lidt idtr
    gate VECTOR, tick
    mask_pic
    enable_lapic
    movl $0x0b, LAPIC + 0x3e0   # divide by 1
    movl $VECTOR, LAPIC + 0x320 # one shot
    mov $STEP, %ebx
round:
    mov ticks, %ecx
    mov %ebx, LAPIC + 0x380
    wait_for_more ticks, %ecx
    add $STEP, %ebx
    cmp $LATEST, %ebx
    jb 3f
    sub $(LATEST - STEP), %ebx
3:  decl rounds
    jnz round
    exit 0x33
tick:
    incl ticks
    eoi
    leave_interrupt
    idt_table
    .data
ticks: .long 0
rounds: .long ROUNDS
