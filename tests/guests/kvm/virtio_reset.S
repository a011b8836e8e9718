# Kicks the entropy device and resets it at once, ROUNDS times; each time it uses the queue's memory for something else
# as soon as the reset has returned, and looks after a while whether that is still as it left it. Says READY, the
# rounds in which it was not, the status after the last reset, and what one more request, slept for, got.
#include "machine.inc"
#include "virtio.inc"
.set OTHER_USE, 0x5a5a5a5a
    pvh_entry
    start_driver
again:
    mov $descriptors, %esi
    call bring_up
    describe 0, buffer, BYTES, WRITE
    describe 1, (buffer+BYTES), BYTES, WRITE
    make_available 0
    make_available 1
    kick
    mov left, %ecx              # a little later each time
    loop .
    movl $0, STATUS
    mov $OTHER_USE, %eax
    mov $ring, %edi
    mov $((buffer_end - ring) / 4), %ecx
    rep stosl
    mov $150, %ecx
    loop .
    mov $OTHER_USE, %eax
    mov $ring, %edi
    mov $((buffer_end - ring) / 4), %ecx
    repe scasl
    je 1f
    incl report
1:  decl left
    jnz again
    mov STATUS, %eax
    mov %eax, report + 4
    mov $descriptors, %esi
    call bring_up
    describe 0, (report+8), BYTES, WRITE
    make_available 0
    kick
2:  mov interrupts, %ebx        # one of a round before may still be waiting to be taken
    cmpw $0, ring + 2
    jne 3f
    call sleep
    jmp 2b
3:  send ready, 6
    send report, (8+BYTES)
    exit 0x12
    driver_code
    .data
    .balign 4
buffer: .fill 2 * BYTES, 1, 0
buffer_end:
left: .long ROUNDS
report: .long 0, 0
    .fill BYTES, 1, 0
