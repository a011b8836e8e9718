# A guest for mimobox, whose kernel it takes the place of: one answer to each line on COM1, by the line's first letter.
# It is entered in 64-bit mode, and may poll for as long as it likes.
.set COM1, 0x3f8
.set LSR, 5
    .code64
    .globl _start
_start:
    lea ready(%rip), %rsi
say:
    mov $COM1, %edx
1:  lodsb
    test %al, %al
    jz listen
    out %al, %dx
    jmp 1b
listen:
    xor %ebx, %ebx              # the line's first letter, once there is one
byte:
    mov $COM1 + LSR, %edx
    in %dx, %al
    test $1, %al
    jz byte
    mov $COM1, %edx
    in %dx, %al
    cmp $'\n', %al
    je answer
    test %ebx, %ebx
    jnz byte
    movzbl %al, %ebx
    jmp byte
answer:
    lea pong(%rip), %rsi
    cmp $'P', %bl               # PING
    je say
    lea cleaned(%rip), %rsi
    cmp $'C', %bl               # CLEAN
    je say
    lea output(%rip), %rsi      # a command
    jmp say
ready: .asciz "mimobox-kvm: init OK\nREADY\n"
pong: .asciz "PONG\n"
cleaned: .asciz "CLEANED\n"
output: .asciz "OUTPUT:1:hi\\n\nEXIT:0\n"
