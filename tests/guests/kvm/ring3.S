# Runs the same loop in ring 0 and, with IOPL 3, in ring 3; the host sees where each begins and ends by an OUT.
# Then it spins in ring 3. Enters ring 3 by SYSEXIT (Intel; an emulator that lacks IRET knows it) or by IRET.
#include "machine.inc"
.set MARK, 0x1000
    .code64
    .globl _start
_start:                         # by the 64-bit boot protocol; page tables of its own, everything open to ring 3
    cld
    mov $top, %eax
    mov %rax, %cr3
    lgdt gdtr
    mov $stack_top, %esp
    mov $MARK, %edx
    mov $RING0_ROUNDS, %ecx
    out %al, %dx
1:  dec %ecx
    jnz 1b
    out %al, %dx
    xor %eax, %eax
    cpuid
    cmp $0x756e6547, %ebx       # "Genu"ineIntel
    jne 2f
    mov $0x174, %ecx            # IA32_SYSENTER_CS: ring 3's 64-bit code is 32 behind, its stack 40
    mov $0x10, %eax
    xor %edx, %edx
    wrmsr
    pushq $0x3002               # IOPL 3
    popfq
    mov $ring3, %edx
    mov $stack_top, %ecx
    rex.w sysexit
2:  pushq $0x3b
    pushq $stack_top
    pushq $0x3002
    pushq $0x33
    pushq $ring3
    iretq
ring3:
    mov $MARK, %edx
    mov $RING3_ROUNDS, %ecx
    out %al, %dx
1:  dec %ecx
    jnz 1b
    out %al, %dx
    mov $COM1, %dx
    mov %cs, %eax
    and $3, %al
    add $'0', %al
    out %al, %dx                # its privilege level
    mov $SCR, %dx
    mov $'s', %al
    out %al, %dx
    xor %eax, %eax
    in %dx, %al
    mov $COM1, %dx
    out %al, %dx
2:  jmp 2b
    .data
    .balign 4096
top: .quad pointers + 7
    .fill 511, 8, 0
pointers: .quad directory + 7
    .fill 511, 8, 0
directory: .quad 0x87, 0x200087
    .fill 510, 8, 0
gdt: .quad 0, 0
    .quad 0x00af9b000000ffff    # 0x10: ring 0, 64-bit code
    .quad 0x00cf93000000ffff    # 0x18: ring 0, data
    .quad 0, 0
    .quad 0x00affb000000ffff    # 0x30: ring 3, 64-bit code
    .quad 0x00cff3000000ffff    # 0x38: ring 3, data
gdtr: .word gdtr - gdt - 1
    .quad gdt
    .bss
    .fill 4096, 1, 0
stack_top:
