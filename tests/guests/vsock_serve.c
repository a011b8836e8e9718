/* vsock_serve PORT PROGRAM [ARGUMENT...]: runs the program for each connection to the guest's vsock port, with the
 * connection as its standard input and output, as inetd does for TCP. It listens once it returns, and goes on in the
 * background. Of AF_VSOCK it takes what libc may lack.
 */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG 16

struct vsock_address {
	sa_family_t family;
	unsigned short reserved;
	unsigned int port;
	unsigned int cid;
	unsigned char flags_and_zero[4];
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void serve(int connection, int listening, char **program)
{
	close(listening);
	if (dup2(connection, 0) < 0 || dup2(connection, 1) < 0)
		die("dup2");
	close(connection);
	execvp(program[0], program);
	die(program[0]);
}

int main(int count, char **words)
{
	struct vsock_address address = { .family = AF_VSOCK, .cid = -1U };
	int listening, connection;

	if (count < 3) {
		fprintf(stderr, "usage: vsock_serve PORT PROGRAM [ARGUMENT...]\n");
		return 2;
	}
	address.port = strtoul(words[1], NULL, 10);
	listening = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (listening < 0)
		die("socket");
	if (bind(listening, (struct sockaddr *)&address, sizeof(address)) || listen(listening, BACKLOG))
		die("listen");
	if (fork())
		return 0;
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		connection = accept(listening, NULL, NULL);
		if (connection < 0 && errno != EINTR)
			die("accept");
		if (connection >= 0 && !fork())
			serve(connection, listening, words + 2);
		close(connection);
	}
}
