# Two processors: the first starts the second by INIT and SIPI, each sleeps until the other's interrupt comes, then
# both write ROUNDS times to a port of their own at the same time, and the first ends the machine.
#include "machine.inc"
.set VECTOR, 0x50
.set TRAMPOLINE, 0x10000
.set ROUNDS, 500
    pvh_entry
    lidt idtr
    gate VECTOR, interrupt
    enable_lapic
    mov $trampoline, %esi
    mov $TRAMPOLINE, %edi
    mov $trampoline_end - trampoline, %ecx
    rep movsb
    movl $0x01000000, LAPIC + 0x310     # to APIC ID 1
    movl $0x00004500, LAPIC + 0x300     # INIT
    movl $0x01000000, LAPIC + 0x310
    movl $0x00004600 + (TRAMPOLINE >> 12), LAPIC + 0x300    # SIPI, twice as the MP specification has it
    movl $0x01000000, LAPIC + 0x310
    movl $0x00004600 + (TRAMPOLINE >> 12), LAPIC + 0x300
1:  cmpl $0, up                         # the second is there, with interrupts off
    je 1b
    putc '0'
    movl $0x01000000, LAPIC + 0x310
    movl $0x00004000 + VECTOR, LAPIC + 0x300
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
    movl $0x00000000, LAPIC + 0x310
    movl $0x00004000 + VECTOR, LAPIC + 0x300
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

    .code16
trampoline:
    cli
    mov %cs, %ax                        # its base is TRAMPOLINE
    mov %ax, %ds
    lgdtl gdtr - trampoline
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $CODE, $TRAMPOLINE + (protected - trampoline)
    .code32
protected:
    mov $DATA, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $ap_stack_top, %esp
    jmp *ap_entry
gdtr: .word 0x1f
    .long 0x500
trampoline_end:
    .data
up: .long 0
go: .long 0
done: .long 0
woken: .long 0, 0
ap_entry: .long ap
    idt_table
    .bss
ap_stack: .fill 4096, 1, 0
ap_stack_top:
