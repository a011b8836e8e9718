# Says READY. Told "h", it says as a driver does that it heeds its VM generation ID; told "?", it says what is there (16
# bytes), what its event device has for it (a byte), and "!".
#include "machine.inc"
.set EVENTS, 0x603
.set ID, 0xef000
    pvh_entry
    send ready, 6
1:  in8 LSR
    test $1, %al
    jz 1b
    in8 COM1
    cmp $'h', %al
    je 2f
    cmp $'?', %al
    jne 1b
    send ID, 16
    in8 EVENTS
    mov %al, events
    send events, 2
    jmp 1b
2:  out8 EVENTS, 1
    putc 'h'
    jmp 1b
    .data
ready: .ascii "READY\n"
events: .ascii "?!"
