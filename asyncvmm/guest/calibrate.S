# The calibration guest: 64-bit ring-0 code, loaded anywhere, that times loops of a length the host names.
#
# Every pass it asks for a number of rounds, at least 1 (IN, 32 bits), runs them, reports how long they took by its
# TSC, in units of 1024 ticks (OUT, 32 bits), and makes EXITS more OUTs (8 bits) back to back, each of which costs one
# exit and nothing else. It never ends: the host stops running it. machine/kvm/calibration_guest.py holds the same
# PORT, EXITS and INSTRUCTIONS_PER_ROUND.
#
# The guest's own clock is read, because the host's sees what delays the host as well. The instructions are such as
# every emulator of ring-0 code knows, with memory and stack accesses as a kernel has them.

.set PORT, 0xe0
.set EXITS, 16

    .code64
    .globl _start
_start:
pass:
    mov $PORT, %edx
    in %dx, %eax
    mov %eax, %ecx
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, %r8
round:                              # 8 instructions
    push %rcx
    add (%rsp), %rax
    mov %rax, -8(%rsp)
    xor %rcx, %rsi
    pop %rbx
    lea 1(%rdi), %rdi
    dec %ecx
    jnz round
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    sub %r8, %rax
    shr $10, %rax
    mov $PORT, %edx
    out %eax, %dx
    .rept EXITS
    out %al, %dx
    .endr
    jmp pass
