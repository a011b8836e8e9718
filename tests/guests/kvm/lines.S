# Leaves COM1's interrupt line high. Says "!", and "i" when the interrupt of a byte has come, which it does not read;
# or, if MASKED, only "!", for the line is level-triggered and masked then. Told anything on COM2, it says how many
# interrupts there have been by then, the vector in the IOAPIC's entry of the line, which was selected all the time,
# and the IOAPIC's ID (as 'A' and on). Then it reads the byte, says ".", and when there is one more interrupt, how
# many there were. If MASKED, it unmasks the line before, and says "1" for any number; and nothing after ".".
#include "machine.inc"
.set COM2, 0x2f8
.set LINE, 'v'
.set LEVEL, 1 << 15
.set MASK, 1 << 16
.set IOWIN, IOAPIC + 0x10

.macro say_count
    mov count, %eax
    mov $COM1, %dx
    out %al, %dx
.endm

    pvh_entry
    lidt idtr
    gate LINE, line
    enable_lapic
    mask_pic
    movl $0, IOAPIC             # its ID
    movl $0x0a000000, IOWIN
    movl $0x19, IOAPIC          # the entry of pin 4
    movl $0, IOWIN
    movl $0x18, IOAPIC
#if MASKED
    movl $LINE | LEVEL | MASK, IOWIN
#else
    movl $LINE, IOWIN
#endif
    out8 FCR, 0x01
    out8 IER, 0x01
    out8 MCR, 0x08
    putc '!'
#if MASKED == 0
    call another
    putc 'i'
#endif
1:  in8 COM2 + 5
    test $1, %al
    jz 1b
    in8 COM2
#if MASKED
    movl $LINE | LEVEL, IOWIN
#endif
    sti
    mov $1000, %ecx
2:  pause
    loop 2b
    cli
    say_count
    mov IOWIN, %eax
    mov $COM1, %dx
    out %al, %dx
    movl $0, IOAPIC
    mov IOWIN, %eax
    shr $24, %eax
    add $'A', %al
    out %al, %dx
    movl $0x18, IOAPIC
    in8 COM1
    putc '.'
#if MASKED == 0
    call another
    say_count
#endif
3:  hlt
    jmp 3b

another:                        # waits for another interrupt than there were
    mov count, %ebx
    sti
4:  pause
    cmp %ebx, count
    je 4b
    cli
    ret

line:
#if MASKED
    movl $'1', count
    movl $LINE | LEVEL | MASK, IOWIN
#else
    incl count
#endif
    eoi
    leave_interrupt

    .data
count: .long '0'
    idt_table
