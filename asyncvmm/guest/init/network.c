/*
 * The loopback interface, and the network card as /asyncvmm/run/net asks for it, in one line:
 *
 *     eth0 dhcp
 *     eth0 192.0.2.2/24 gateway=192.0.2.1 dns=192.0.2.1
 *
 * DHCP is busybox's udhcpc; its script /asyncvmm/dhcp writes what it got as a line of the second form, which PID 1
 * then carries out by netdevice(7). A lease is not renewed. A network that cannot be had is an init-warning line:
 * the boot goes on.
 */
#include "init.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEASE "/run/asyncvmm-lease"

enum { LINE_SIZE = 512, TICK_MS = 5, LINK_TICKS = 200, DHCP_TICKS = 2000 };

static char name_servers[LINE_SIZE]; /* of /etc/resolv.conf */
static int control = -1;             /* a socket to make ioctls on */

static struct ifreq request_for(const char *interface)
{
	struct ifreq request = { 0 };
	strncpy(request.ifr_name, interface, IFNAMSIZ - 1);
	return request;
}

static struct sockaddr to_sockaddr(struct in_addr address)
{
	union { struct sockaddr any; struct sockaddr_in in; } both = { 0 };
	both.in.sin_family = AF_INET;
	both.in.sin_addr = address;
	return both.any;
}

static bool bring_up(const char *interface)
{
	struct ifreq request = request_for(interface);
	if (ioctl(control, SIOCGIFFLAGS, &request) != 0)
		return false;
	request.ifr_flags |= IFF_UP;
	return ioctl(control, SIOCSIFFLAGS, &request) == 0;
}

/* IFF_RUNNING would say the same up to a second later: the kernel's link watcher takes its time. */
static bool wait_for_carrier(const char *interface)
{
	char path[64], carrier[4];
	snprintf(path, sizeof path, "/sys/class/net/%.15s/carrier", interface);
	for (int i = 0; i < LINK_TICKS; i++) {
		if (read_file(path, carrier, sizeof carrier) > 0 && carrier[0] == '1')
			return true;
		sleep_ms(TICK_MS);
	}
	return false;
}

static bool parse_prefix(const char *text, struct in_addr *mask)
{
	char *end;
	unsigned long bits = strtoul(text, &end, 10);
	if (end == text || *end || bits > 32)
		return false;
	mask->s_addr = bits ? htonl(UINT32_MAX << (32 - bits)) : 0;
	return true;
}

static bool set_address(const char *interface, char *text)
{
	struct in_addr address, mask;
	struct ifreq request = request_for(interface);
	char *ip = strsep(&text, "/");
	if (!text || !inet_aton(ip, &address) || !parse_prefix(text, &mask))
		return false;
	request.ifr_addr = to_sockaddr(address);
	if (ioctl(control, SIOCSIFADDR, &request) != 0)
		return false;
	request.ifr_netmask = to_sockaddr(mask);
	return ioctl(control, SIOCSIFNETMASK, &request) == 0 && bring_up(interface);
}

/* The route to one host on the link if `gateway` is NULL, else the default route. */
static bool add_route(char *interface, const struct in_addr *host, const struct in_addr *gateway)
{
	struct rtentry route = { .rt_dev = interface, .rt_flags = RTF_UP | (gateway ? RTF_GATEWAY : RTF_HOST) };
	struct in_addr none = { 0 }, all = { INADDR_BROADCAST };
	route.rt_dst = to_sockaddr(gateway ? none : *host);
	route.rt_genmask = to_sockaddr(gateway ? none : all);
	route.rt_gateway = to_sockaddr(gateway ? *gateway : none);
	return ioctl(control, SIOCADDRT, &route) == 0 || errno == EEXIST;
}

/* A gateway outside the address's own network is a neighbour all the same: some hosts give out a /32. */
static bool set_gateway(char *interface, const char *text)
{
	struct in_addr gateway;
	if (!inet_aton(text, &gateway))
		return false;
	if (add_route(interface, NULL, &gateway))
		return true;
	return add_route(interface, &gateway, NULL) && add_route(interface, NULL, &gateway);
}

static bool add_name_server(const char *text)
{
	struct in_addr server;
	size_t held = strlen(name_servers);
	if (!inet_aton(text, &server) || held + strlen(text) + sizeof "nameserver \n" > sizeof name_servers)
		return false;
	snprintf(name_servers + held, sizeof name_servers - held, "nameserver %s\n", text);
	return true;
}

/* Returns what it failed in, NULL if in nothing. */
static const char *carry_out(char *interface, char *settings)
{
	char *word;
	if (!set_address(interface, strsep(&settings, " ")))
		return "address";
	while ((word = strsep(&settings, " "))) {
		if (!strncmp(word, "gateway=", 8) && !set_gateway(interface, word + 8))
			return "gateway";
		if (!strncmp(word, "dns=", 4) && !add_name_server(word + 4))
			return "dns";
	}
	return NULL;
}

_Noreturn static void become_udhcpc(char *interface)
{
	char *argv[] = { "udhcpc", "-i", interface, "-f", "-n", "-q", "-t", "5", "-T", "1", "-s", "/asyncvmm/dhcp", NULL };
	char *env[] = { "PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL };
	sigset_t none;
	uart_revoke();
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int stream = 0; stream <= 2; stream++)
		dup2(fd, stream);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execve("/bin/busybox", argv, env);
	_exit(127);
}

static bool run_udhcpc(char *interface)
{
	int status = -1;
	pid_t pid = fork();
	if (pid == 0)
		become_udhcpc(interface);
	for (int i = 0; pid > 0 && waitpid(pid, &status, WNOHANG) == 0; i++) {
		if (i == DHCP_TICKS)
			kill(pid, SIGKILL);
		sleep_ms(TICK_MS);
	}
	return status == 0;
}

static char *strip_newline(char *line)
{
	line[strcspn(line, "\n")] = 0;
	return line;
}

static const char *ask_dhcp(char *interface)
{
	static char lease[LINE_SIZE];
	char *next = lease;
	if (!wait_for_carrier(interface))
		return "link";
	if (!run_udhcpc(interface) || read_file(LEASE, lease, sizeof lease) <= 0)
		return "dhcp";
	unlink(LEASE);
	strip_newline(lease);
	strsep(&next, " ");
	return next ? carry_out(interface, next) : "dhcp";
}

void bring_up_network(void)
{
	static char line[LINE_SIZE];
	control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	bring_up("lo");
	if (read_file("/asyncvmm/run/net", line, sizeof line) > 0) {
		char *settings = strip_newline(line), *interface = strsep(&settings, " ");
		const char *problem = "settings";
		if (settings && !bring_up(interface))
			problem = "interface";
		else if (settings)
			problem = strcmp(settings, "dhcp") ? carry_out(interface, settings) : ask_dhcp(interface);
		if (problem)
			say("init-warning net=%s", problem);
	}
	close(control);
}

/* After the root has been entered, for it is there that they are looked for. A link is replaced, not followed. */
void write_name_servers(void)
{
	static const char path[] = "/etc/resolv.conf";
	struct stat found;
	if (!*name_servers)
		return;
	mkdir("/etc", 0755);
	if (lstat(path, &found) == 0 && !S_ISREG(found.st_mode))
		unlink(path);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, name_servers, strlen(name_servers)) < 0)
		say("init-warning net=resolv.conf");
	if (fd >= 0)
		close(fd);
}
