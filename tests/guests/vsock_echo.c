/* A guest's half of a vsock test. "listen PORT" serves one connection after the other, "connect PORT" makes one to the
 * host; either sends back what it gets until the other side sends no more, then ends its own.
 */

#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 16];

static int echo(int fd)
{
	ssize_t got;

	while ((got = read(fd, buffer, sizeof(buffer))) > 0) {
		for (ssize_t sent = 0; sent < got;) {
			ssize_t n = write(fd, buffer + sent, got - sent);
			if (n < 0) {
				perror("write");
				return 1;
			}
			sent += n;
		}
	}
	close(fd);
	return got < 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (argc != 3 || fd < 0) {
		perror("socket");
		return 2;
	}
	address.svm_port = strtoul(argv[2], NULL, 10);
	address.svm_cid = strcmp(argv[1], "connect") ? VMADDR_CID_ANY : VMADDR_CID_HOST;
	if (!strcmp(argv[1], "connect")) {
		if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
			perror("connect");
			return 3;
		}
		return echo(fd);
	}
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 128)) {
		perror("listen");
		return 4;
	}
	for (;;)
		echo(accept(fd, NULL, NULL));
}
