/* Kicks queue 0 of the device at the first virtio-mmio place and sleeps until its interrupt, KICKS times. Its time-stamp
 * counter just before each kick stands at STAMPS, that at the beginning of each interrupt 8 bytes behind.
 *
 * With DRIVER the device is an entropy device, brought up by the specification and given one buffer a kick. Without,
 * nobody answers at the registers: an ioeventfd and an irqfd are all there is.
 */
#include "pvh.inc"
.set DEVICE, 0xc0001000
.set GSI, 5
.set VECTOR, 0x25
.set SIZE, 8
.set LAPIC, 0xfee00000
.set IOAPIC, 0xfec00000

.macro set register, value
    movl $\value, DEVICE + \register
.endm

.macro stamp at
    rdtsc
    mov %eax, STAMPS + \at
    mov %edx, STAMPS + \at + 4
.endm

    pvh_entry
    mov $0x80000, %esp
    mov $interrupt, %eax
    movw %ax, gate
    shr $16, %eax
    movw %ax, gate + 6
    lidt idtr
    out8 0x21, 0xff
    out8 0xa1, 0xff
    movl $0x1ff, LAPIC + 0xf0
    movl $(0x10 + 2 * GSI), IOAPIC
    movl $VECTOR, IOAPIC + 0x10
    movl $(0x11 + 2 * GSI), IOAPIC
    movl $0, IOAPIC + 0x10
.if DRIVER
    set 0x070, 0
    set 0x070, 1
    set 0x070, 3
    set 0x024, 1
    set 0x020, 1                # VERSION_1
    set 0x070, 0x0b
    set 0x038, SIZE
    set 0x080, table
    set 0x090, avail
    set 0x0a0, used
    set 0x044, 1
    set 0x070, 0x0f
.endif
    mov $KICKS, %ebx
again:
.if DRIVER
    incw avail + 2              # entries are all 0: the one descriptor
.endif
    mov $PAUSE, %ecx            # let the host fall asleep
    loop .
    movl $0, taken
    stamp 0
    set 0x050, 0
1:  sti
    hlt
    cli
    cmpl $0, taken
    je 1b
    dec %ebx
    jnz again
    set 0x050, 0                # for the last interrupt to be looked at
    exit 0

interrupt:
    stamp 8
    movl $1, taken
    set 0x064, 1
    movl $0, LAPIC + 0xb0
    pushl 8(%esp)               # IRET without IRET, which KVM's emulator lacks
    pushl 4(%esp)
    popl 12(%esp)
    popl 4(%esp)
    addl $4, %esp
    popfl
    ret

    .data
    .balign 16
table: .long buffer, 0, 16, 2, 0, 0, 0, 0
    .fill 16 * (SIZE - 2), 1, 0
avail: .fill 6 + 2 * SIZE, 1, 0
    .balign 4
used: .fill 6 + 8 * SIZE, 1, 0
    .balign 8
idt: .fill VECTOR, 8, 0
gate: .word 0, 0x10, 0x8e00, 0
idtr: .word . - idt - 1
    .long idt
taken: .long 0
buffer: .fill 16, 1, 0
