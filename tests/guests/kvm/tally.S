# Counts in ring 3, in a register, in memory, and in every FPU and vector register; after each ROUNDS it compares them
# all and writes the next of 64 letters to the console. What has come out wrong ends the machine, by the debug-exit port.
# With AVX, the upper halves of the vector registers count as well: they are in the XSAVE area alone.
#include "machine.inc"
#include "ring3.inc"
.set LETTERS, 64
    .code64
    .globl _start
_start:                         # by the 64-bit boot protocol
    cld
    mov %cr0, %rax
    and $~0xc, %eax             # neither EM nor TS
    or $2, %eax                 # MP
    mov %rax, %cr0
    mov %cr4, %rax
#if AVX
    or $0x40000, %eax           # OSXSAVE
#endif
    or $0x600, %eax             # OSFXSR, OSXMMEXCPT
    mov %rax, %cr4
#if AVX
    xor %ecx, %ecx
    xor %edx, %edx
    mov $7, %eax
    xsetbv
#endif
    load_ring3_tables
    enter_ring3 ring3

.macro each_vector of:vararg
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    \of \n
    .endr
.endm

.macro vector_begin n           # both quadwords at 256 * n
    mov $(256 * \n), %eax
    movq %rax, %xmm\n
    punpcklqdq %xmm\n, %xmm\n
#if AVX
    vinsertf128 $1, %xmm\n, %ymm\n, %ymm\n
#endif
.endm

.macro vector_count n
    paddq ones, %xmm\n
.endm

.macro quad_check n
    mov $(256 * \n), %ecx
    sub %rcx, %rax
    cmp %rax, %r12
    jne wrong
.endm

.macro vector_check n
    movdqu %xmm\n, scratch
    mov scratch, %rax
    quad_check \n
    mov scratch + 8, %rax
    quad_check \n
#if AVX
    vextractf128 $1, %ymm\n, scratch
    mov scratch, %rax
    cmp $(256 * \n), %rax       # they do not count: PADDQ leaves them alone
    jne wrong
    mov scratch + 8, %rax
    cmp $(256 * \n), %rax
    jne wrong
#endif
.endm

ring3:
    fninit
    fldcw control
    ldmxcsr status
    .rept 3
    fldpi
    fldl2e
    .endr
    fldz                        # the last one counts, the others keep their constants
    each_vector vector_begin
    fxsave64 at_first
    xor %r12, %r12              # the count
    xor %r14, %r14              # the letter
1:  mov $ROUNDS, %r13d
2:  inc %r12
    incq count
    each_vector vector_count
    fld1
    faddp
    dec %r13d
    jnz 2b
    each_vector vector_check
    cmp count, %r12
    jne wrong
    fistpll scratch             # the count of the FPU's own, and back onto the stack
    fildll scratch
    mov scratch, %rax
    cmp %rax, %r12
    jne wrong
    fxsave64 now
    mov $(at_first + 32 + 16), %esi
    mov $(now + 32 + 16), %edi
    mov $(6 * 16), %ecx
    repe cmpsb
    jne wrong
    mov at_first, %eax          # the control word
    cmp %ax, now
    jne wrong
    mov at_first + 24, %eax     # MXCSR
    cmp %eax, now + 24
    jne wrong
    in8 LSR
    test $0x20, %al
    jz wrong
    lea '0'(%r14), %eax
    mov $COM1, %edx
    out %al, %dx
    inc %r14
    and $(LETTERS - 1), %r14
    jmp 1b

wrong:
    exit 0x21

    ring3_tables 2
    .data
count: .quad 0
control: .word 0x0f7f           # rounding towards zero, double extended, all masked
status: .long 0x9f80            # flush to zero, round to nearest, all masked
    .balign 64
ones: .quad 1, 1
scratch: .quad 0, 0, 0, 0
    .balign 64
at_first: .fill 512, 1, 0
now: .fill 512, 1, 0
