# Arms a timer (TIMER: the local APIC's, 0 one shot, 1 periodic, 2 TSC deadline; 3 the PIT's channel 0, once), says
# "!", and waits for a byte with interrupts off. Then it stops the local APIC's, takes what interrupts there are, and
# says how many ticks that were.
#include "machine.inc"
.set TICK, 0x60
.set COUNT, 300000000           # nanoseconds
.set CYCLES, 600000000
.set TSC_DEADLINE, 0x6e0

.macro set_deadline             # edx:eax
    mov $TSC_DEADLINE, %ecx
    wrmsr
.endm

    pvh_entry
    lidt idtr
    gate TICK, tick
    enable_lapic
    mask_pic
    route 0, TICK
    out8 FCR, 0x01
#if TIMER == 3
    out8 0x43, 0x30             # mode 0
    out8 0x40, 0xff             # of 838 ns each
    out8 0x40, 0xff
#else
    movl $0x0b, LAPIC + 0x3e0   # divide by 1
    movl $(TICK + (TIMER << 17)), LAPIC + 0x320
#if TIMER == 2
    rdtsc
    add $CYCLES, %eax
    adc $0, %edx
    set_deadline
#else
    movl $COUNT, LAPIC + 0x380
#endif
#endif
    putc '!'
1:  in8 LSR
    test $1, %al
    jz 1b
    in8 COM1
#if TIMER == 2
    xor %eax, %eax
    xor %edx, %edx
    set_deadline
#elif TIMER != 3
    movl $0, LAPIC + 0x380
#endif
    sti
    mov $1000, %ecx
2:  pause
    loop 2b
    cli
    mov ticks, %eax
    mov $COM1, %dx
    out %al, %dx
3:  hlt
    jmp 3b

tick:
    incl ticks
    eoi
    leave_interrupt

    .data
ticks: .long '0'
    idt_table
