# Asks the entropy device for something impossible, by HOW, and looks at the status; then resets it and behaves. Says
# READY, the status, the number of interrupts until then and InterruptStatus; and what the good request got.
#   1 a descriptor table outside RAM         2 a head beyond the queue           3 an available index that jumps
#   4 a chain that is a circle               5 a buffer outside RAM              6 a buffer at the end of the address space
#include "machine.inc"
#include "virtio.inc"
    pvh_entry
    start_driver
.if HOW == 1
    mov $0xb0000000, %esi
.else
    mov $descriptors, %esi
.endif
    call bring_up
.if HOW == 5
    describe 0, 0xb0000000, BYTES, WRITE
.else
    describe 0, (report+12), BYTES, WRITE
.endif
.if HOW == 4
    describe 0, (report+12), BYTES, WRITE|NEXT, 1
    describe 1, (report+12), BYTES, WRITE|NEXT, 0
.endif
.if HOW == 6
    movl $-8, descriptors
    movl $-1, descriptors + 4
.endif
.if HOW > 1
.if HOW == 2
    make_available 9
.else
    make_available 0
.endif
.if HOW == 3
    movw $1000, avail + 2
.endif
    xor %ebx, %ebx
    kick
    call sleep
.endif
    mov STATUS, %eax
    mov %eax, report
    mov interrupts, %eax
    mov %eax, report + 4
    mov reason, %eax
    mov %eax, report + 8
    mov $descriptors, %esi
    call bring_up
    describe 0, (report+12), BYTES, WRITE
    mov interrupts, %ebx
    make_available 0
    kick
    call sleep
    send ready, 6
    send report, (12+BYTES)
    exit 0x13
    driver_code
    .data
report: .long 0, 0, 0
    .fill BYTES, 1, 0
