/*
 * PID 1 of an asyncvmm guest: what its files share.
 *
 * It keeps the guest contract on COM2 ("the control line"): one text line per fact, ended by "\n". It prints nothing
 * on the console, but why there is no root. The files, in the order in which a boot runs through them: main.c,
 * setup.c, uart.c, clock.c, modules.c, network.c, ports.c, root.c, control.c, workload.c, lockdown.c, listeners.c.
 */
#ifndef ASYNCVMM_INIT_H
#define ASYNCVMM_INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

/* uart.c: the 16550 at COM2, polled. Without a UART there, writes vanish and reads find nothing. */
void uart_open(void);
void uart_revoke(void);
void uart_write(const char *text, size_t length);
int uart_read(void); /* a byte, or -1 when none waits */

/* control.c: lines from the host. */
void control_poll(void);
bool control_mid_line(void); /* a line has begun and its rest is on the way */

/* clock.c */
uint64_t monotonic_ns(void);
uint64_t monotonic_at(uint64_t tsc, uint64_t khz);       /* what it was at that value of the time stamp counter */
void set_clock(uint64_t realtime_ns, uint64_t at_ns);    /* that was the time when CLOCK_MONOTONIC was at_ns */
void say_clock(void); /* ties CLOCK_MONOTONIC to the time stamp counter, for a host that knows the latter */
void say_gone(void);  /* ties CLOCK_REALTIME to it, as the answer to "go" */

/* setup.c */
void mount_all(void);
int open_console(void);
void make_raw(int fd);
void drain_console(void);
extern int console_fd;

/* modules.c: drivers for the virtio devices that are there, in the order of /asyncvmm/modules.list. */
void load_modules(void);
void load_filesystem(const char *type);
void forget_modules(void); /* frees their files */

/* network.c */
void bring_up_network(void);
void write_name_servers(void);

/* ports.c */
void find_ports(void);
void ports_poll(void); /* for those that came since */

/* root.c */
void enter_root(void);
void leave_root(void);

/* workload.c */
void workload_read(void);                      /* what to run: before the root is entered */
void workload_start(void);
void workload_go(void);                        /* opens the gate of an armed workload; else nothing */
bool workload_waits(void);                     /* it stands in the pre-exec window */
void workload_reaped(pid_t pid, int status);   /* says workload-exit if it was the workload */

/* lockdown.c */
void lock_kernel(void);        /* shuts root's ways around the missing capabilities, for everybody, for good */
bool drop_capabilities(void);  /* of the calling process and all it will ever exec */

/* listeners.c */
void listeners_poll(void);

/* main.c */
void sleep_ms(unsigned milliseconds);
void interrupt_by_alarms(void); /* from then on a timer ends what this process waits for */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));  /* one whole line, with its "\n" */
ssize_t read_file(const char *path, char *buffer, size_t size);           /* NUL-terminated; -1 if unreadable */
bool write_file(const char *path, const char *text);
void each_entry(const char *directory, void (*visit)(const char *name));  /* but those that begin with a dot */
_Noreturn void power_off(void);
_Noreturn void restart(void);

#endif
