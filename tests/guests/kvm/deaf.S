# Says READY on COM2 as PID 1 does, and never answers what it is told there. BEATS: it reads it, says its clock first as
# ours does, and then one heartbeat after the other.
#include "machine.inc"
.set COM2, 0x2f8

    pvh_entry
    mov $text, %esi
    mov $text_end - text, %ecx
    mov $COM2, %dx
    rep outsb
#if BEATS == 0
1:  hlt
    jmp 1b
#else
beat:
    mov $100, %ecx
1:  mov $COM2 + 5, %dx
    in %dx, %al
    test $1, %al
    jz 2f
    mov $COM2, %dx
    in %dx, %al
2:  loop 1b
    mov $heartbeat, %esi
    mov $heartbeat_end - heartbeat, %ecx
    mov $COM2, %dx
    rep outsb
    jmp beat
#endif

    .data
text:
#if BEATS
    .ascii "clock tsc=1 ns=1 tsc_end=2\n"
#endif
    .ascii "READY\n"
text_end:
heartbeat:
    .ascii "heartbeat counter=1\n"
heartbeat_end:
