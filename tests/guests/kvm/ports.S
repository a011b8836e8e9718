# Port accesses of every width, single and by string, at ports with and without a device.
#include "machine.inc"
    pvh_entry
    mov $NOWHERE, %dx
    mov $0x11223344, %eax
    out %al, %dx
    out %ax, %dx
    out %eax, %dx
    xor %eax, %eax
    in %dx, %al
    mov %eax, answers
    xor %eax, %eax
    in %dx, %ax
    mov %eax, answers + 4
    xor %eax, %eax
    in %dx, %eax
    mov %eax, answers + 8
    mov $SCR, %dx               # a word at the last register: its high byte belongs to nobody
    mov $0x6b5a, %ax
    out %ax, %dx
    xor %eax, %eax
    in %dx, %ax
    mov %eax, answers + 12
    mov $answers + 16, %edi     # strings in: bytes of a register, then words and dwords of nothing
    mov $8, %ecx
    mov $SCR, %dx
    rep insb
    mov $NOWHERE, %dx
    mov $2, %ecx
    rep insw
    mov $2, %ecx
    rep insl
    mov $answers, %esi          # strings out to nothing
    mov $2, %ecx
    rep outsw
    mov $2, %ecx
    rep outsl
    send answers, 36
    exit 0x21
    .data
    .balign 4
answers: .fill 36, 1, 0x55
