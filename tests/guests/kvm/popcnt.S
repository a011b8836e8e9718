# An instruction that KVM's emulator does not know, where ring 0 is emulated.
#include "machine.inc"
    pvh_entry
    putc '.'
    popcnt %eax, %ebx
    exit 0x42
