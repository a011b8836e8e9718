# Says it is there by polled output and ends.
#include "machine.inc"
    pvh_entry
    send hello, 6
    exit 0x10
    .data
hello: .ascii "hello\n"
