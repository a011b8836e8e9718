# Asks the entropy device REQUESTS times for 16 bytes, each time asleep until the interrupt; with event indices two
# buffers more under one kick, the interrupt wanted for the second only. Then says READY and what it got: the number of
# interrupts, InterruptStatus as last seen, the used index, the status; and the buffers.
#include "machine.inc"
#include "virtio.inc"

    pvh_entry
    start_driver
    mov $descriptors, %esi
    call bring_up
    mov $report + 16, %edi
1:  describe 0, 0, BYTES, WRITE
    mov %edi, descriptors
    make_available 0
.if EVENT_IDX
    movw ring + 2, %ax
    movw %ax, used_event
.endif
    mov interrupts, %ebx
    kick
    call sleep
    add $BYTES, %edi
    decl left
    jnz 1b
.if EVENT_IDX
    describe 0, 0, BYTES, WRITE
    mov %edi, descriptors
    add $BYTES, %edi
    describe 1, 0, BYTES, WRITE
    mov %edi, descriptors + 16
    make_available 0
    make_available 1
    movw ring + 2, %ax
    inc %ax
    movw %ax, used_event
    mov interrupts, %ebx
    kick
    call sleep
.endif
    mov interrupts, %eax
    mov %eax, report
    mov reason, %eax
    mov %eax, report + 4
    movzwl ring + 2, %eax
    mov %eax, report + 8
    mov STATUS, %eax
    mov %eax, report + 12
    send ready, 6
    send report, (report_end-report)
    exit 0x11
    driver_code
    .data
left: .long REQUESTS
report: .long 0, 0, 0, 0
    .fill BYTES * (REQUESTS + 2 * EVENT_IDX), 1, 0
report_end:
