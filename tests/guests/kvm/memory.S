# Does to its memory what it is told on COM1, in ring 3, which runs at full speed where ring 0 is emulated. Numbers are 32
# bits, little-endian; pages are of 4 KiB. Each command is answered when it is done.
#   w page value        store a byte in a page                                  -> k
#   r page              what is there                                           -> that byte
#   f page count value  fill pages                                              -> k
#   c page count        the sum of their 64-bit words                           -> 8 bytes
#   d page count pace   count up in each page in turn, each after pace * 1024 TSC ticks, until a byte comes  -> k
#   x                   count up its own counter                                -> its low byte
# It says '>' when it is there.
#include "machine.inc"
#include "ring3.inc"
.set PLACE, 0x11                # where in a page w and r go
    .code64
    .globl _start
_start:
    cld
    load_ring3_tables
    enter_ring3 ring3

ring3:
    mov $'>', %al
answer:
    mov $COM1, %edx
    out %al, %dx
next:
    call get
    cmp $'w', %al
    je store
    cmp $'r', %al
    je load
    cmp $'f', %al
    je fill
    cmp $'c', %al
    je sum
    cmp $'d', %al
    je dirty
    cmp $'x', %al
    je count
    mov $'?', %al
    jmp answer

store:
    call get_page
    call get
    mov %al, PLACE(%rdi)
done:
    mov $'k', %al
    jmp answer

load:
    call get_page
    mov PLACE(%rdi), %al
    jmp answer

fill:
    call get_page
    call get_number
    shl $12, %r8
    mov %r8, %r9
    call get
    mov %r9, %rcx
    rep stosb
    jmp done

sum:
    call get_page
    call get_number
    shl $9, %r8
    xor %rbx, %rbx
1:  add (%rdi), %rbx
    add $8, %rdi
    dec %r8
    jnz 1b
    mov $8, %ecx
    mov $COM1, %edx
2:  mov %rbx, %rax
    out %al, %dx
    shr $8, %rbx
    loop 2b
    jmp next

dirty:
    call get_page
    mov %rdi, %r10              # the first page
    call get_number
    mov %r8, %r11
    shl $12, %r11
    add %r10, %r11              # behind the last
    call get_number
    shl $10, %r8
    mov %r8, %r12               # ticks
1:  mov %r10, %rdi
2:  incl (%rdi)
    rdtsc
    shl $32, %rdx
    lea (%rax, %rdx), %r13
    add %r12, %r13
3:  rdtsc
    shl $32, %rdx
    add %rdx, %rax
    cmp %r13, %rax
    jb 3b
    mov $LSR, %edx
    in %dx, %al
    test $1, %al
    jnz 4f
    add $4096, %rdi
    cmp %r11, %rdi
    jb 2b
    jmp 1b
4:  call get
    jmp done

count:
    incl counter
    mov counter, %al
    jmp answer

get:                            # a byte to AL; RDX is lost
    mov $LSR, %edx
1:  in %dx, %al
    test $1, %al
    jz 1b
    mov $COM1, %edx
    in %dx, %al
    ret

get_number:                     # to R8; RAX, RCX and RDX are lost
    xor %r8, %r8
    xor %ecx, %ecx
1:  call get
    movzx %al, %eax
    shl %cl, %rax
    or %rax, %r8
    add $8, %ecx
    cmp $32, %ecx
    jb 1b
    ret

get_page:                       # an address to RDI
    call get_number
    mov %r8, %rdi
    shl $12, %rdi
    ret

    ring3_tables 512
    .data
counter: .long 0
