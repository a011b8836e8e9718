# The calibration guest: 64-bit ring-0 code, loaded at any address, that runs loops of a length the host names.
#
# Every pass it asks the host for a number of rounds (IN), marks the begin (OUT), runs them, marks the end (OUT), and
# makes EXITS more OUTs back to back, which cost one exit each and nothing else. It never ends: the host stops
# running it. machine/kvm/calibrate.py holds the same PORT, EXITS and INSTRUCTIONS_PER_ROUND.
#
# The instructions are such as every emulator of ring-0 code knows, with memory accesses and stack use as in a kernel.

.set PORT, 0xe0
.set EXITS, 16

    .code64
    .globl _start
_start:
    mov $PORT, %edx
pass:
    in %dx, %eax
    mov %eax, %ecx
    out %al, %dx
round:                              # INSTRUCTIONS_PER_ROUND = 8
    push %rcx
    add (%rsp), %rax
    mov %rax, -8(%rsp)
    xor %rcx, %rsi
    pop %rbx
    lea 1(%rdi), %rdi
    dec %ecx
    jnz round
    out %al, %dx
    .rept EXITS
    out %al, %dx
    .endr
    jmp pass
