# A guest to be saved and restored. It fills TOUCHED_MIB of its memory, says READY, and waits for a byte on COM1, in ring
# 3, which runs on the processor itself also where ring 0 is emulated. Only ring 0 can halt: with RING0 it stays there,
# and fills no more than the first word of each page. Then, as the byte says:
#   w   read READS pages and write one byte in each of WRITES others, answer w, and rest
#   d   and four bytes, a number: count up in one page after the other, each so many ticks of the TSC later, for ever
#   o   write dots, for ever
#   i   answer i, and rest
# It rests by halting for good in ring 0, and in a loop in ring 3. With TWO, vCPU 1 goes round in a loop of its own.
#include "pvh.inc"
#include "ring3.inc"
.set DATA_AT, 0x1000000         # what is filled
.set PAGE, 4096
.set AP_PAGE, 0x10
.set LAPIC_ICR, 0xfee00300
    pvh_entry
    mov $stack_top, %esp
#if TWO
    movw $0xfeeb, AP_PAGE << 12 # jmp to itself
    movl $0x1ff, 0xfee000f0
    movl $0x01000000, LAPIC_ICR + 0x10
    movl $0x4500, LAPIC_ICR     # INIT
    mov $2000, %ecx
1:  dec %ecx
    jnz 1b
    movl $0x4600 + AP_PAGE, LAPIC_ICR
#endif
    mov $top, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax             # LME
    wrmsr
    mov %cr0, %eax
    and $0x1fffffff, %eax       # neither CD nor NW
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt gdtr
    ljmp $0x10, $long
    .code64
long:
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    load_ring3_tables
#if RING0
    mov $DATA_AT, %edi
    mov $(TOUCHED_MIB << 8), %ecx
    mov $0x0123456789abcdef, %rax
1:  mov %rax, (%rdi)
    add $PAGE, %edi
    dec %ecx
    jnz 1b
    jmp filled
#endif
    enter_ring3 ring3
ring3:
    cld
    mov $DATA_AT, %edi
    mov $(TOUCHED_MIB << 17), %ecx
    mov $0x0123456789abcdef, %rax
    rep stosq
filled:
    mov $text, %esi
1:  lodsb
    test %al, %al
    jz next
    call put
    jmp 1b
next:
    call get
    cmp $'w', %al
    je work
    cmp $'d', %al
    je dirty
    cmp $'o', %al
    je dots
    cmp $'i', %al
    jne next
    call put
rest:
#if RING0
    cli
    hlt
#endif
    jmp rest

dots:
    mov $'.', %al
    call put
    jmp dots

work:
    mov $DATA_AT, %edi
    mov $READS, %ecx
1:  mov (%rdi), %al
    add $PAGE, %edi
    dec %ecx
    jnz 1b
    mov $WRITES, %ecx
1:  incb (%rdi)
    add $PAGE, %edi
    dec %ecx
    jnz 1b
    mov $'w', %al
    call put
    mov $'\n', %al
    call put
    jmp rest

dirty:
    mov $4, %ecx
1:  call get
    shl $24, %eax
    shr $8, %ebp
    or %eax, %ebp
    dec %ecx
    jnz 1b
    mov $'d', %al
    call put
2:  mov $DATA_AT, %edi
3:  rdtsc
    shl $32, %rdx
    or %rdx, %rax
    lea (%rax, %rbp), %rbx
4:  pause
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    cmp %rbx, %rax
    jb 4b
    incl 8(%rdi)
    add $PAGE, %edi
    cmp $DATA_AT + (TOUCHED_MIB << 20), %edi
    jb 3b
    jmp 2b

get:
    mov $LSR, %edx
1:  in %dx, %al
    test $1, %al
    jz 1b
    mov $COM1, %edx
    in %dx, %al
    ret

put:
    mov %eax, %ebx
    mov $LSR, %edx
1:  in %dx, %al
    test $THRE, %al
    jz 1b
    mov %ebx, %eax
    mov $COM1, %edx
    out %al, %dx
    ret

    .data
text: .asciz "READY\n"
    ring3_tables 512
