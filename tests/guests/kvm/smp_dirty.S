# Two processors that write to memory at the same time: COUNT pages each, by turns one's and the other's, a word of each
# counted up by one. Each byte on COM1 has them do it once; the first says 'k' when both are done. It says '>' when it is
# there.
#include "machine.inc"
#include "second.inc"
.set FIRST, 0x200000
.set COUNT, 1500
.macro write_pages from
    mov $\from, %edi
    mov $COUNT, %ecx
7:  incl (%edi)
    add $8192, %edi
    dec %ecx
    jnz 7b
.endm
    pvh_entry
    enable_lapic
    start_second sipis=2
1:  cmpl $0, up
    je 1b
    putc '>'
again:
    in8 LSR
    test $1, %al
    jz again
    in8 COM1
    incl rounds                         # the second begins
    write_pages FIRST
2:  mov rounds, %eax
    cmp done, %eax
    jne 2b
    putc 'k'
    jmp again

ap:
    movl $1, up
4:  mov rounds, %eax
    cmp done, %eax
    je 4b
    write_pages FIRST + 4096
    incl done
    jmp 4b

    second_processor
    .data
up: .long 0
rounds: .long 0
done: .long 0
