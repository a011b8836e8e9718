/* A guest of a few hundred bytes, entered by PVH in 32-bit protected mode: it greets on COM1 and COM2, then answers
 * what comes in on COM1, polling.
 *
 *   a letter   comes back in upper case        ^O   a line on COM1, then a line on COM2
 *   ^D         debug exit with 0x2a            ^R   reset by the i8042
 *   ^T         triple fault                    ^F   a flood of lines on COM1, for ever
 */
    .section .note.pvh, "a", @note
    .long 4, 4, 18                      /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long _start

    .set COM1, 0x3f8
    .set COM2, 0x2f8
    .set THRE, 0x20
    .set DR, 0x01

    .section .text
    .code32
    .globl _start
_start:
    cli
    movl $0x80000, %esp
    movl $COM1, %ebx
    movl $hello1, %esi
    call print
    movl $COM2, %ebx
    movl $hello2, %esi
    call print
    movl $COM1, %ebx

next:
    leal 5(%ebx), %edx
1:  inb %dx, %al
    testb $DR, %al
    jz 1b
    movl %ebx, %edx
    inb %dx, %al
    cmpb $0x04, %al
    je debug_exit
    cmpb $0x06, %al
    je flood
    cmpb $0x0f, %al
    je both
    cmpb $0x12, %al
    je reset
    cmpb $0x14, %al
    je triple_fault
    cmpb $'a', %al
    jb 2f
    cmpb $'z', %al
    ja 2f
    subb $0x20, %al
2:  call put
    jmp next

debug_exit:
    movw $0xf4, %dx
    movb $0x2a, %al
    outb %al, %dx
    jmp next

flood:
    movl $line, %esi
    call print
    jmp flood

both:
    movl $first, %esi
    call print
    movl $COM2, %ebx
    movl $second, %esi
    call print
    movl $COM1, %ebx
    jmp next

reset:
    movw $0x64, %dx
    movb $0xfe, %al
    outb %al, %dx
3:  hlt
    jmp 3b

triple_fault:
    lidt no_idt
    int3

/* Write the string at %esi to the port %ebx. */
print:
    lodsb
    testb %al, %al
    jz 4f
    call put
    jmp print
4:  ret

/* Write %al to the port %ebx once its transmitter is empty. */
put:
    movb %al, %cl
    leal 5(%ebx), %edx
5:  inb %dx, %al
    testb $THRE, %al
    jz 5b
    movl %ebx, %edx
    movb %cl, %al
    outb %al, %dx
    ret

    .section .data
hello1: .asciz "hello console\n"
hello2: .asciz "hello control\n"
first:  .asciz "first\n"
second: .asciz "second\n"
line:   .asciz "all work and no play\n"
no_idt: .word 0
        .long 0
