/*
 * The course of a boot, and the command loop in which PID 1 stays: reap children, read the control line, say
 * heartbeats and listeners. Between two ticks it sleeps in the kernel; a child's end wakes it at once.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECOND_NS = 1000000000, MS_NS = 1000000, LINE_SIZE = 256 };
/* Milliseconds between two looks at the control line: each look may be an exit to the VMM. */
enum { TICK_MID_LINE = 1, TICK_AT_GATE = 5, TICK_BUSY = 20, TICK_IDLE = 50 };

static sigset_t signals;

void sleep_ms(unsigned milliseconds)
{
	struct timespec time = { milliseconds / 1000, (long)(milliseconds % 1000) * MS_NS };
	nanosleep(&time, NULL);
}

static void wake_up(int signal)
{
	(void)signal;
}

void interrupt_by_alarms(void)
{
	struct sigaction action = { .sa_handler = wake_up };
	sigaction(SIGALRM, &action, NULL);
}

void say(const char *format, ...)
{
	char line[LINE_SIZE];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	if (length < 0 || length >= (int)sizeof line - 1)
		return;
	line[length++] = '\n';
	uart_write(line, (size_t)length);
}

ssize_t read_file(const char *path, char *buffer, size_t size)
{
	size_t held = 0;
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	while (held < size - 1 && (n = read(fd, buffer + held, size - 1 - held)) > 0)
		held += (size_t)n;
	close(fd);
	buffer[held] = 0;
	return (ssize_t)held;
}

bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	bool written = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return written;
}

/* opendir(3) would bring malloc along, a fifth of the program. */
void each_entry(const char *directory, void (*visit)(const char *name))
{
	struct linux_dirent64 { uint64_t ino, offset; uint16_t length; uint8_t type; char name[]; };
	_Alignas(8) char entries[1024];
	long size;
	int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	while (fd >= 0 && (size = syscall(SYS_getdents64, fd, entries, sizeof entries)) > 0) {
		const struct linux_dirent64 *entry;
		for (long at = 0; at < size; at += entry->length) {
			entry = (const void *)(entries + at);
			if (entry->name[0] != '.')
				visit(entry->name);
		}
	}
	if (fd >= 0)
		close(fd);
}

static _Noreturn void end(int how)
{
	leave_root();
	sync();
	reboot(how);
	for (;;)
		pause(); /* a PID 1 that returns is a panic */
}

void power_off(void)
{
	end(RB_POWER_OFF);
}

void restart(void)
{
	end(RB_AUTOBOOT);
}

static void block_signals(void)
{
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGUSR1);
	sigaddset(&signals, SIGUSR2);
	sigaddset(&signals, SIGTERM);
	sigset_t blocked = signals;
	sigaddset(&blocked, SIGTTOU); /* PID 1 drains and hands over a terminal whose foreground it is not */
	sigprocmask(SIG_SETMASK, &blocked, NULL);
}

/* Returns whether children are left. */
static bool reap(void)
{
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		workload_reaped(pid, status);
	return pid == 0;
}

static void heartbeat(void)
{
	static uint64_t next, counter;
	uint64_t now = monotonic_ns();
	if (!next)
		next = now + SECOND_NS;
	if (now < next)
		return;
	next = next + SECOND_NS > now ? next + SECOND_NS : now + SECOND_NS;
	say("heartbeat counter=%llu", (unsigned long long)++counter);
	ports_poll();
}

/* Once no child is left, none will ever be: nothing but the host asks anything of PID 1. */
static void say_idle(void)
{
	static bool said;
	if (!said)
		say("idle");
	said = true;
}

static long tick_ms(bool busy)
{
	if (control_mid_line())
		return TICK_MID_LINE;
	if (workload_waits())
		return TICK_AT_GATE;
	return busy ? TICK_BUSY : TICK_IDLE;
}

/* SIGUSR1, SIGUSR2 and SIGTERM are how busybox's halt, poweroff and reboot ask their init. */
static void wait_for_tick(bool busy)
{
	struct timespec tick = { 0, tick_ms(busy) * MS_NS };
	int signal = sigtimedwait(&signals, NULL, &tick);
	if (signal == SIGUSR1 || signal == SIGUSR2)
		power_off();
	if (signal == SIGTERM)
		restart();
}

static _Noreturn void command_loop(void)
{
	for (;;) {
		bool busy = reap();
		control_poll();
		heartbeat();
		if (!busy)
			say_idle();
		else if (!workload_waits())
			listeners_poll();
		wait_for_tick(busy);
	}
}

static void say_stage(const char *stage, uint64_t ns)
{
	say("BOOT_TIME:%s:%llu", stage, (unsigned long long)ns);
}

static void say_first_stages(uint64_t init_entry, uint64_t mounts_done)
{
	uint64_t uart_access_done = monotonic_ns();
	say_clock();
	say_stage("init_entry", init_entry);
	say_stage("mounts_done", mounts_done);
	say_stage("uart_access_done", uart_access_done);
}

int main(void)
{
	uint64_t init_entry = monotonic_ns();
	mount_all();
	uint64_t mounts_done = monotonic_ns();
	uart_open();
	say_first_stages(init_entry, mounts_done);
	block_signals();
	load_modules();
	bring_up_network();
	find_ports();
	workload_read();
	enter_root();
	write_name_servers();
	sethostname("asyncvmm", 8);
	open_console();
	say_stage("init_ok", monotonic_ns());
	say_stage("ready", monotonic_ns());
	say("READY");
	say_stage("command_loop", monotonic_ns());
	heartbeat();
	workload_start();
	command_loop();
}
