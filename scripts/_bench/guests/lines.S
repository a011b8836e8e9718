/* Says READY, then LINES lines on COM1, TICKS of the time-stamp counter apart, for a reader that wants to know how late
 * each one comes.
 */
#include "pvh.inc"
    pvh_entry
    mov $ready, %esi
    mov $6, %ecx
    mov $COM1, %dx
    rep outsb
    mov $LINES, %ebx
1:  rdtsc
    mov %eax, %ecx
2:  rdtsc
    sub %ecx, %eax
    cmp $TICKS, %eax
    jb 2b
    out8 COM1, 'x'
    out8 COM1, 10
    dec %ebx
    jnz 1b
    exit 0
    .data
ready: .ascii "READY\n"
