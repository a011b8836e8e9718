/* Prints one line, says READY, and waits. */
#include "pvh.inc"
    pvh_entry
    mov $text, %esi
    mov $COM1, %edi
1:  lea LSR - COM1(%edi), %edx
2:  in %dx, %al
    test $THRE, %al
    jz 2b
    lodsb
    test %al, %al
    jz 3f
    mov %edi, %edx
    out %al, %dx
    jmp 1b
3:  hlt
    jmp 3b
    .data
text: .asciz "hello from the toy guest\nREADY\n"
