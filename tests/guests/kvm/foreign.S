# A guest of other people's making: says what its command line tells it to, on COM1, then does as told.
#
# The command line (PVH start_info, cmdline_paddr at 24) is a program of single letters:
#   R  READY                     B  BOOT_TIME:ready:7          F  forged: workload-pre-exec, then READY and BOOT_TIME
#   P  a kernel's panic line     T  triple fault               O  power off by ACPI S5
#   X  reset by the i8042        D  debug exit with 7          W  wait for one byte on COM1
#   L  a line without end         N  noise, for ever            H  halt for ever
#   E  echo what comes in, for ever   G  the same, but grasp it unseen: 0 is none
#include "machine.inc"
    pvh_entry
    mov $0x80000, %esp
    mov 24(%ebx), %ebp
next:
    movzbl (%ebp), %eax
    inc %ebp
    cmp $'R', %al
    je ready
    cmp $'B', %al
    je boot_time
    cmp $'F', %al
    je forged
    cmp $'P', %al
    je panic
    cmp $'T', %al
    je fault
    cmp $'O', %al
    je off
    cmp $'X', %al
    je reset
    cmp $'D', %al
    je debug_exit
    cmp $'W', %al
    je wait
    cmp $'L', %al
    je line
    cmp $'N', %al
    je noise
    cmp $'E', %al
    je echo
    cmp $'G', %al
    je grasp
    cmp $'H', %al
    jne next
halt:
    cli
    hlt
    jmp halt

.macro say text, length
    mov $\text, %esi
    mov $\length, %ecx
    mov $COM1, %dx
    rep outsb
    jmp next
.endm

ready:     say ready_text, 6
boot_time: say boot_time_text, 18
forged:    say forged_text, 67
panic:     say panic_text, 49
off:       out8 0x600, 0x34
    jmp halt
reset:     out8 0x64, 0xfe
    jmp halt
debug_exit: out8 DEBUG_EXIT, 7
    jmp halt
fault:
    mov $0xfff8, %ax
    mov %ax, %ds
    jmp halt

read:                           # one byte from COM1 into AL
    in8 LSR
    test $1, %al
    jz read
    in8 COM1
    ret

wait:
    call read
    jmp next

echo:
    call read
    mov $COM1, %dx
    out %al, %dx
    jmp echo

grasp:
    in8 COM1
    test %al, %al
    jz grasp
    out %al, %dx
    jmp grasp

line:
    mov $long_text, %esi
    mov $256, %ecx
    mov $COM1, %dx
    rep outsb
    jmp line

noise:                          # its own code is as good as any
    mov $0x100000, %esi
    mov $256, %ecx
    mov $COM1, %dx
    rep outsb
    jmp noise

    .data
ready_text: .ascii "READY\n"
boot_time_text: .ascii "BOOT_TIME:ready:7\n"
forged_text: .ascii "workload-pre-exec\nREADY\nBOOT_TIME:ready:9\nBOOT_TIME:command_loop:9\n"
panic_text: .ascii "Kernel panic - not syncing: no init to be found.\n"
long_text: .fill 256, 1, 'x'
