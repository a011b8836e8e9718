# Echoes what it receives, all by interrupts of IRQ 4: received data fills a ring, THRE empties it. EOT ends it.
# CHIP is 0 for the IOAPIC, 1 for the PIC behind LINT0.
#include "machine.inc"
.set VECTOR, 0x24
.set EOT, 4
    pvh_entry
    lidt idtr
    gate VECTOR, interrupt
.if CHIP == 0
    mask_pic
    enable_lapic
    route 4, VECTOR
.else
    out8 0x20, 0x11             # ICW1..4: edge, cascade, vectors from 0x20, 8086 mode
    out8 0x21, 0x20
    out8 0x21, 0x04
    out8 0x21, 0x01
    out8 0x21, 0xef             # IRQ 4 only
.endif
    xor %esi, %esi              # bytes taken out of the ring
    xor %edi, %edi              # bytes put into it
    out8 FCR, 0xc7
    out8 MCR, 0x0b
    out8 IER, 0x01
    putc '>'
1:  cli
    cmpl $0, ended
    je 2f
    cmp %esi, %edi
    je 3f
2:  sti
    hlt
    jmp 1b
3:  exit 0

interrupt:
    push %eax
    push %edx
    push %ecx
again:
    in8 IIR
    and $0x0f, %al
    cmp $0x04, %al
    je receive
    cmp $0x0c, %al
    je receive
    cmp $0x02, %al
    je transmit
    test $0x01, %al
    jnz done
    exit 2                      # an interrupt that was not asked for
receive:
    in8 COM1
    cmp $EOT, %al
    je end
    mov %edi, %ecx
    and $0xfff, %ecx
    mov %al, ring(%ecx)
    inc %edi
    out8 IER, 0x03
    jmp again
end:
    movl $1, ended
    jmp again
transmit:
    mov $COM1, %edx
    mov $16, %ecx
1:  cmp %esi, %edi
    je 2f
    mov %esi, %eax
    and $0xfff, %eax
    mov ring(%eax), %al
    out %al, %dx
    inc %esi
    dec %ecx
    jnz 1b
    jmp again
2:  out8 IER, 0x01
    jmp again
done:
.if CHIP == 0
    eoi
.else
    out8 0x20, 0x20
.endif
    pop %ecx
    pop %edx
    pop %eax
    leave_interrupt
    idt_table
    .data
ended: .long 0
    .bss
ring: .fill 4096, 1, 0
