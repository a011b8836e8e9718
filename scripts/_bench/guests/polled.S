/* 20,000 bytes polled out of COM1 in lines of 80, behind one empty line that starts the reader's stop-watch. */
#include "pvh.inc"
    pvh_entry
    mov $COM1, %edi
    mov $LSR, %esi
    mov $10, %bl
    mov $BYTES + 1, %ecx
    mov $1, %ebp
1:  mov %esi, %edx
2:  in %dx, %al
    test $THRE, %al
    jz 2b
    mov %ebx, %eax
    mov %edi, %edx
    out %al, %dx
    mov $'a', %bl
    dec %ebp
    jnz 3f
    mov $80, %ebp
3:  cmp $1, %ebp
    jne 4f
    mov $10, %bl
4:  dec %ecx
    jnz 1b
    exit 0
