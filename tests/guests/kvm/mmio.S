# Reads and writes of every width at physical addresses with nothing there, in long mode.
#include "machine.inc"
    .code64
    .globl _start
_start:                         # by the 64-bit boot protocol: only RAM is mapped; map the gigabyte at 3 GiB as well
    cld
    movq $hole_directory + 3, 0xa000 + 3 * 8
    mov $HOLE, %ebx
    xor %eax, %eax
    mov (%rbx), %al
    mov %rax, answers
    xor %eax, %eax
    mov 0x10(%rbx), %ax
    mov %rax, answers + 8
    xor %eax, %eax
    mov 0x20(%rbx), %eax
    mov %rax, answers + 16
    xor %eax, %eax
    mov 0x30(%rbx), %rax
    mov %rax, answers + 24
    mov $0x1122334455667788, %rax
    mov %al, 0x40(%rbx)
    mov %ax, 0x50(%rbx)
    mov %eax, 0x60(%rbx)
    mov %rax, 0x70(%rbx)
    send answers, 32
    exit 0x22
    .data
    .balign 4096
hole_directory:                 # 2 MiB pages: 0xd0000000 and 0xd0200000
    .fill 128, 8, 0
    .quad HOLE + 0x83, HOLE + 0x200083
    .fill 382, 8, 0
answers: .fill 32, 1, 0x55
