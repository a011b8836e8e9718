# Writes REQUESTS sectors of the disk at the first virtio-mmio place, one after the other, each full of its own number,
# from 1; reads each back and compares; says its number's low byte on COM1. Asleep until the interrupt, but it goes by the
# used ring: an interrupt too many does no harm. It says READY first, and the used index at the end.
#define KIND 2
#include "machine.inc"
#include "virtio.inc"
.set SECTOR, 512
.set SECTORS, 64
.set IN, 0
.set OUT, 1

.macro request kind, buffer, flags
    movl $\kind, header
    mov number, %eax
    and $(SECTORS - 1), %eax
    mov %eax, header + 8
    movb $0xff, state
    describe 0, header, 16, NEXT, 1
    describe 1, \buffer, SECTOR, (NEXT | \flags), 2
    describe 2, state, 1, WRITE
    make_available 0
    kick
    call answered
    cmpb $0, state
    je 1f
    exit 5
1:
.endm

    pvh_entry
    start_driver
    mov $descriptors, %esi
    call bring_up
    send ready, 6
round:
    incl number
    mov number, %eax
    mov $written, %edi
    mov $(SECTOR / 4), %ecx
    rep stosl
    request OUT, written, 0
    request IN, read, WRITE
    mov $read, %edi
    mov $(SECTOR / 4), %ecx
    mov number, %eax
    repe scasl
    je 1f
    exit 6
1:  mov $COM1, %dx
    mov number, %al
    out %al, %dx
    cmpl $REQUESTS, number
    jb round
    send ring + 2, 2
    exit 0x11

answered:                       # until as many are used as were made available
    cli
.if EVENT_IDX
    movw ring + 2, %ax
    movw %ax, used_event
    lock addl $0, (%esp)        # a fence: it is there before the used index is looked at once more
.endif
    movw avail + 2, %ax
    cmpw %ax, ring + 2
    je 1f
    sti
    hlt
    jmp answered
1:  ret
    driver_code
    .data
number: .long 0
    .balign 16
header: .long 0, 0, 0, 0
state: .byte 0
    .balign 16
written: .fill SECTOR, 1, 0
    .balign 4096                # a page that the device alone writes to
read: .fill SECTOR, 1, 0
