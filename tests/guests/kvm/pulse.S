# Rounds of everything that a processor waits for: an interrupt sent to the other processor and answered, the local
# APIC's timer (TIMER: 0 one shot, 1 periodic, 2 TSC deadline), the PIT's channel 0, and a byte on COM1, which is echoed.
# Whatever gets lost stops it for good; what comes twice, ends it by the debug-exit port. Ticks may come too often.
#include "machine.inc"
#include "second.inc"
.set CALL, 0x50
.set TICK, 0x60
.set PIT_TICK, 0x61
.set RECEIVED, 0x62
.set LAPIC_COUNT, 200000        # nanoseconds
.set PIT_COUNT, 200             # of 838 ns
.set TSC_DEADLINE, 0x6e0
.set CYCLES, 400000

    pvh_entry
    lidt idtr
    gate CALL, call
    gate TICK, tick
    gate PIT_TICK, pit_tick
    gate RECEIVED, received
    enable_lapic
    mask_pic
    route 0, PIT_TICK
    route 4, RECEIVED
    out8 FCR, 0x01
    out8 IER, 0x01
    out8 MCR, 0x08
    start_second
3:  cmpl $0, up
    je 3b
    movl $0x0b, LAPIC + 0x3e0           # divide by 1
    movl $(TICK + (TIMER << 17)), LAPIC + 0x320
#if TIMER == 1
    movl $LAPIC_COUNT, LAPIC + 0x380
#endif
    putc '!'                            # from here on it takes bytes
    sti
round:
    incl called                         # 1. call the other, and wait for its answer
    ipi 1, 0x4000 + CALL
4:  cli
    mov answers, %eax
    cmp %eax, called
    je 5f
    jb twice
    sti
    hlt
    jmp 4b
5:  sti
    mov ticks, %ebx                     # 2. the local APIC's timer
#if TIMER == 0
    movl $LAPIC_COUNT, LAPIC + 0x380
#elif TIMER == 2
    rdtsc
    add $CYCLES, %eax
    adc $0, %edx
    mov $TSC_DEADLINE, %ecx
    wrmsr
#endif
    wait_for_more ticks, %ebx
    mov pit_ticks, %ebx                 # 3. the PIT's, mode 0: once
    out8 0x43, 0x30
    out8 0x40, (PIT_COUNT & 0xff)
    out8 0x40, (PIT_COUNT >> 8)
    wait_for_more pit_ticks, %ebx
    mov echoed, %ebx                    # 4. a byte
    wait_for_more bytes, %ebx
    incl echoed
    and $255, %ebx
    mov buffer(%ebx), %al
    mov $COM1, %dx
    out %al, %dx
    jmp round

twice:
    exit 0x22

ap:
    lidt idtr
    enable_lapic
    movl $1, up
6:  sti
    hlt
    jmp 6b

call:                                   # on either processor
    push %eax
    mov LAPIC + 0x20, %eax
    shr $24, %eax
    jz 7f
    incl answered
    mov answered, %eax
    cmp %eax, called
    jne twice
    ipi 0, 0x4000 + CALL
    jmp 8f
7:  incl answers
8:  eoi
    pop %eax
    leave_interrupt

tick:
    incl ticks
    eoi
    leave_interrupt

pit_tick:
    incl pit_ticks
    eoi
    leave_interrupt

received:
    push %eax
    push %ebx
    push %edx
    in8 IIR
9:  in8 LSR
    test $1, %al
    jz 10f
    in8 COM1
    mov bytes, %ebx
    and $255, %ebx
    mov %al, buffer(%ebx)
    incl bytes
    jmp 9b
10: eoi
    pop %edx
    pop %ebx
    pop %eax
    leave_interrupt

    second_processor
    .data
up: .long 0
called: .long 0
answered: .long 0
answers: .long 0
ticks: .long 0
pit_ticks: .long 0
bytes: .long 0
echoed: .long 0
    idt_table
    .bss
buffer: .fill 256, 1, 0
