/*
 * What keeps a workload, though root, off the control line. It loses the capabilities that lead to I/O ports, to
 * module loading and into PID 1's memory (capabilities(7)); the kernel's own ways of running a program with all
 * capabilities (modprobe, core_pattern, release_agent) lose them too; and where the kernel has lockdown
 * (kernel_lockdown(7)), that shuts the rest: kexec, TIOCSSERIAL turning ttyS0 into COM2, /dev/mem, BPF writes.
 */
#include "init.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/capability.h, which musl does not ship. */
enum { CAP_SYS_MODULE = 16, CAP_SYS_RAWIO = 17, CAP_SYS_PTRACE = 19 };
enum { CAPABILITY_VERSION_3 = 0x20080522 };
struct cap_header { uint32_t version; int pid; };
struct cap_data { uint32_t effective, permitted, inheritable; };

static const uint32_t DROPPED = 1u << CAP_SYS_MODULE | 1u << CAP_SYS_RAWIO | 1u << CAP_SYS_PTRACE;

static void strip_usermode_helpers(const char *path)
{
	char text[64], *high;
	if (read_file(path, text, sizeof text) < 0)
		return;
	unsigned long low = strtoul(text, &high, 10);
	unsigned long rest = strtoul(high, NULL, 10);
	snprintf(text, sizeof text, "%lu %lu", low & ~(unsigned long)DROPPED, rest);
	write_file(path, text);
}

void lock_kernel(void)
{
	strip_usermode_helpers("/proc/sys/kernel/usermodehelper/bset");
	strip_usermode_helpers("/proc/sys/kernel/usermodehelper/inheritable");
	write_file("/proc/sys/kernel/kexec_load_disabled", "1");
	mount("securityfs", "/sys/kernel/security", "securityfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	write_file("/sys/kernel/security/lockdown", "integrity");
}

bool drop_capabilities(void)
{
	struct cap_header header = { CAPABILITY_VERSION_3, 0 };
	struct cap_data data[2];
	for (int cap = 0; cap < 32; cap++)
		if (DROPPED >> cap & 1 && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) != 0)
			return false;
	if (syscall(SYS_capget, &header, data) != 0)
		return false;
	data[0].effective &= ~DROPPED;
	data[0].permitted &= ~DROPPED;
	data[0].inheritable &= ~DROPPED;
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	return syscall(SYS_capset, &header, data) == 0;
}
