/* HUNDREDS times 100 OUTs to PORT, a newline on COM1 before and after: their time stamps are the stop-watch. The OUTs are
 * unrolled, so that the loop around them weighs next to nothing where ring 0 is emulated.
 */
#include "pvh.inc"
    pvh_entry
    out8 COM1, 10
    mov $HUNDREDS, %ecx
    mov $PORT, %dx
    mov $'a', %al
1:
    .rept 100
    out %al, %dx
    .endr
    dec %ecx
    jnz 1b
    out8 COM1, 10
    exit 0
