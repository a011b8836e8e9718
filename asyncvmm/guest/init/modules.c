/*
 * Loads kernel modules from /asyncvmm/modules. A line "<file> <need>" of /asyncvmm/modules.list names one; they are
 * loaded in that order, each only if its need is there:
 *
 *     mmio, pci    a virtio device on that transport
 *     2            a virtio device of that id (virtio 1.2, section 5: 1 network, 2 block, 3 console, 4 entropy,
 *                  5 balloon, 19 socket)
 *     overlay, …   a file system that the root is made of: load_filesystem()
 */
#include "init.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LIST_SIZE = 8192, MODULES_MAX = 128, DEVICES_MAX = 64, IDS = 64, VIRTIO_PCI_VENDOR = 0x1af4 };

static struct { const char *file, *need; } modules[MODULES_MAX];
static size_t count;

static void read_list(void)
{
	static char list[LIST_SIZE];
	char *next = list, *entry;
	if (read_file("/asyncvmm/modules.list", list, sizeof list) <= 0)
		return;
	while ((entry = strsep(&next, "\n")) && count < MODULES_MAX) {
		char *file = strsep(&entry, " ");
		if (!*file || !entry)
			continue;
		modules[count].file = file;
		modules[count++].need = entry;
	}
}

static bool has_virtio_mmio(void)
{
	static char cmdline[4096];
	if (access("/sys/bus/acpi/devices/LNRO0005:00", F_OK) == 0)
		return true;
	return read_file("/proc/cmdline", cmdline, sizeof cmdline) > 0 && strstr(cmdline, "virtio_mmio.device=");
}

static bool pci;

static void look_at_pci_device(const char *address)
{
	char path[320], vendor[16];
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/vendor", address);
	pci |= read_file(path, vendor, sizeof vendor) > 0 && strtoul(vendor, NULL, 16) == VIRTIO_PCI_VENDOR;
}

/* Bit n: there is a virtio device of id n. */
static uint64_t virtio_devices(void)
{
	char path[64], text[16];
	uint64_t found = 0;
	for (int i = 0; i < DEVICES_MAX; i++) {
		snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/device", i);
		unsigned long id = read_file(path, text, sizeof text) > 0 ? strtoul(text, NULL, 16) : IDS;
		if (id < IDS)
			found |= UINT64_C(1) << id;
	}
	return found;
}

static void load(const char *file)
{
	char path[128];
	if (snprintf(path, sizeof path, "/asyncvmm/modules/%s", file) >= (int)sizeof path)
		return;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
		say("init-warning module=%s", file);
	if (fd >= 0)
		close(fd);
}

static void load_needed_for(const char *need)
{
	for (size_t i = 0; i < count; i++)
		if (!strcmp(modules[i].need, need))
			load(modules[i].file);
}

static void load_drivers(void)
{
	uint64_t devices = virtio_devices();
	for (size_t i = 0; i < count; i++) {
		unsigned long id = isdigit(*modules[i].need) ? strtoul(modules[i].need, NULL, 10) : IDS;
		if (id < IDS && devices >> id & 1)
			load(modules[i].file);
	}
}

void load_modules(void)
{
	bool mmio = has_virtio_mmio();
	each_entry("/sys/bus/pci/devices", look_at_pci_device);
	read_list();
	if (mmio)
		load_needed_for("mmio");
	if (pci)
		load_needed_for("pci");
	if (mmio || pci)
		load_drivers();
}

void load_filesystem(const char *type)
{
	load_needed_for(type);
}

void forget_modules(void)
{
	char path[128];
	for (size_t i = 0; i < count; i++) {
		snprintf(path, sizeof path, "/asyncvmm/modules/%s", modules[i].file);
		unlink(path);
	}
}
