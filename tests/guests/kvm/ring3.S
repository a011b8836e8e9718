# Runs the same loop in ring 0 and in ring 3; the host sees where each begins and ends by an OUT. Then it spins in ring 3.
# Ring 3 is entered by SYSEXIT (Intel; an emulator that lacks IRET knows it) or by IRET, with IOPL 3. A host that runs
# ring 3 on the processor and emulates ring 0 may not let it have its IOPL: the TSS permits all ports used here as well.
#include "machine.inc"
.set MARK, 0x1000
    .code64
    .globl _start
_start:                         # by the 64-bit boot protocol; page tables of its own, everything open to ring 3
    cld
    mov $top, %eax
    mov %rax, %cr3
    lgdt gdtr
    mov $tss, %eax
    mov %ax, gdt + 0x40 + 2
    shr $16, %eax
    mov %al, gdt + 0x40 + 4
    mov $0x40, %ax
    ltr %ax
    mov $stack_top, %esp
0:  in8 LSR                     # until a byte comes
    test $1, %al
    jz 0b
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
    mov %cs, %ebx
    and $3, %bl
    add $'0', %bl
    mov $COM1, %edx
    mov %ebx, %eax
    out %al, %dx                # its privilege level
    mov $SCR, %edx
    mov $'s', %al
    out %al, %dx
    xor %eax, %eax
    in %dx, %al
    mov $COM1, %edx
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
    .quad 0x0000890000000fff, 0 # 0x40: the TSS
gdtr: .word gdtr - gdt - 1
    .quad gdt
    .balign 4096
tss: .fill 102, 1, 0
    .word 104                   # where the I/O permission bitmap begins
    .fill 4096 - 104, 1, 0
    .bss
    .fill 4096, 1, 0
stack_top:
