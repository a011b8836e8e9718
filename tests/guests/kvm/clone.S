# Does on COM2 what PID 1 does behind a snapshot: says its clock (if CLOCK) and READY (if HELD, that a workload is about
# to be run as well, which is held and has ended with the first go), then takes "tsc <value> <khz>" and "go <seed>
# <realtime_ns>". After a go it prints the first 16 bytes of the seed on COM1, and answers "go-done tsc=<now>
# realtime_ns=<the time>": the time is go's, and what its time stamp counter has counted since the value in tsc.
#include "machine.inc"
.set COM2, 0x2f8

    pvh_entry
    mov $0x80000, %esp
    mov $ready_text, %esi
    call say

take_line:
    mov $line, %edi
take_byte:
    mov $COM2 + 5, %dx
    in %dx, %al
    test $1, %al
    jz take_byte
    mov $COM2, %dx
    in %dx, %al
    cmp $'\n', %al
    je took_line
    cmp $line + 500, %edi
    jae take_byte
    mov %al, (%edi)
    inc %edi
    jmp take_byte
took_line:
    movb $0, (%edi)
    mov $line + 3, %esi
    cmpb $'g', line
    je go
    inc %esi                        # "tsc <value> <khz>"
    call number
    mov %eax, tsc
    mov %edx, tsc + 4
    inc %esi
    call number
    mov %eax, khz
    jmp take_line

go:                                 # "go <64 hex digits> <ns>"
    mov %esi, %ebx
    add $65, %esi
    call number
    mov %eax, time
    mov %edx, time + 4

    rdtsc
    mov %eax, now
    mov %edx, now + 4
    sub tsc, %eax
    sbb tsc + 4, %edx
    divl khz                        # milliseconds, and ticks of one that has begun
    mov %edx, %ecx
    mov $1000000, %edi
    mul %edi
    add %eax, time
    adc %edx, time + 4
    mov %ecx, %eax
    mul %edi
    divl khz
    add %eax, time
    adcl $0, time + 4

    mov %ebx, %esi
    mov $32, %ecx
    mov $COM1, %dx
    rep outsb
    putc '\n'
    mov $done_text, %esi
    call say
    mov now, %eax
    mov now + 4, %edx
    call say_number
    mov $time_text, %esi
    call say
    mov time, %eax
    mov time + 4, %edx
    call say_number
    mov $COM2, %dx
    mov $'\n', %al
    out %al, %dx
#if HELD
    cmpb $0, has_ended
    jne take_line
    movb $1, has_ended
    mov $exit_text, %esi
    call say
#endif
    jmp take_line

number:                             # the decimal number at esi, in edx:eax; esi behind it
    xor %eax, %eax
    xor %edx, %edx
1:  movzbl (%esi), %ecx
    sub $'0', %ecx
    cmp $9, %ecx
    ja 2f
    inc %esi
    mov %eax, %edi
    imul $10, %edx, %ebp
    mov $10, %eax
    mul %edi
    add %ebp, %edx
    add %ecx, %eax
    adc $0, %edx
    jmp 1b
2:  ret

say:                                # the text at esi, to COM2
    mov $COM2, %dx
1:  mov (%esi), %al
    test %al, %al
    jz 2f
    out %al, %dx
    inc %esi
    jmp 1b
2:  ret

say_number:                         # edx:eax in decimal, to COM2
    mov $digits_end, %edi
    mov $10, %ecx
1:  mov %eax, %ebp
    mov %edx, %eax
    xor %edx, %edx
    div %ecx
    mov %eax, %ebx
    mov %ebp, %eax
    div %ecx
    add $'0', %dl
    dec %edi
    mov %dl, (%edi)
    mov %ebx, %edx
    mov %eax, %ebp
    or %ebx, %ebp
    jnz 1b
    mov %edi, %esi
    jmp say

    .data
ready_text:
#if CLOCK
    .ascii "clock tsc=1 ns=1 tsc_end=2\n"
#endif
#if HELD
    .ascii "READY\n"
    .asciz "workload-pre-exec\n"
exit_text:  .asciz "workload-exit code=0\n"
has_ended:  .byte 0
#else
    .asciz "READY\n"
#endif
done_text:  .asciz "go-done tsc="
time_text:  .asciz " realtime_ns="
    .balign 8
tsc:        .quad 0
now:        .quad 0
time:       .quad 0
khz:        .long 1
digits:     .skip 24
digits_end: .byte 0
line:       .skip 512
