/*
 * The workload: one program, forked, made ready, held one step before exec, then let go.
 *
 * What to run stands in files that a second initramfs archive brought: /asyncvmm/run/argv and env hold strings each
 * ended by a NUL, and arm-pre-exec, if it exists, makes the gate wait for the host's "go".
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TEXT_SIZE = 128 * 1024, WORDS_MAX = 4096 };
enum { EXIT_SETUP = 125, EXIT_NOT_RUNNABLE = 126, EXIT_NOT_FOUND = 127 };

static pid_t pid = -1;
static bool wanted, armed;
static int gate = -1; /* write end; the child execs when a byte comes through */

static char *argv[WORDS_MAX + 1], *env[WORDS_MAX + 8];

static size_t read_words(const char *path, char *text, size_t size, char **words)
{
	ssize_t length = read_file(path, text, size);
	size_t n = 0;
	for (char *word = text; length > 0 && word < text + length && n < WORDS_MAX; word += strlen(word) + 1)
		words[n++] = word;
	words[n] = NULL;
	return n;
}

static void add_default(char *variable, size_t *n)
{
	size_t name = (size_t)(strchr(variable, '=') - variable) + 1;
	for (size_t i = 0; i < *n; i++)
		if (!strncmp(env[i], variable, name))
			return;
	env[(*n)++] = variable;
	env[*n] = NULL;
}

void workload_read(void)
{
	static char argv_text[TEXT_SIZE], env_text[TEXT_SIZE];
	static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
	static char home[] = "HOME=/root", term[] = "TERM=linux";
	size_t n = read_words("/asyncvmm/run/env", env_text, sizeof env_text, env);
	add_default(path, &n);
	add_default(home, &n);
	add_default(term, &n);
	wanted = read_words("/asyncvmm/run/argv", argv_text, sizeof argv_text, argv) > 0;
	armed = access("/asyncvmm/run/arm-pre-exec", F_OK) == 0;
}

static void become_foreground(void)
{
	setpgid(0, 0);
	tcsetpgrp(console_fd, getpid()); /* SIGTTOU is still blocked here */
	for (int fd = 0; fd <= 2; fd++)
		dup2(console_fd, fd);
}

_Noreturn static void run(void)
{
	sigset_t none;
	sigemptyset(&none);
	signal(SIGALRM, SIG_DFL);
	sigprocmask(SIG_SETMASK, &none, NULL);
	extern char **environ;
	environ = env;
	execvp(argv[0], argv);
	int reason = errno;
	dprintf(2, "asyncvmm: cannot run %s: %s\n", argv[0], strerror(reason));
	_exit(reason == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_RUNNABLE);
}

_Noreturn static void child(int ready_fd, int gate_fd)
{
	char byte = 0;
	uart_revoke();
	become_foreground();
	if (!drop_capabilities() || chdir("/") != 0)
		_exit(EXIT_SETUP);
	umask(022);
	if (write(ready_fd, &byte, 1) != 1 || read(gate_fd, &byte, 1) != 1)
		_exit(EXIT_SETUP);
	run();
}

/* Two pipes: the child says on one that it stands at the gate, PID 1 opens the gate on the other. */
static void fork_to_the_gate(void)
{
	int ready_pipe[2], gate_pipe[2];
	char byte;
	if (pipe2(ready_pipe, O_CLOEXEC) != 0 || pipe2(gate_pipe, O_CLOEXEC) != 0)
		return;
	pid = fork();
	if (pid == 0) {
		close(ready_pipe[0]);
		close(gate_pipe[1]);
		child(ready_pipe[1], gate_pipe[0]);
	}
	close(ready_pipe[1]);
	close(gate_pipe[0]);
	if (pid > 0)
		(void)!read(ready_pipe[0], &byte, 1);
	close(ready_pipe[0]);
	gate = gate_pipe[1];
}

void workload_start(void)
{
	if (!wanted)
		return;
	lock_kernel();
	fork_to_the_gate();
	if (pid < 0) {
		say("workload-exit code=%d", EXIT_SETUP);
		return;
	}
	drain_console();
	say("workload-pre-exec");
	if (!armed)
		workload_go();
}

bool workload_waits(void)
{
	return gate >= 0;
}

void workload_go(void)
{
	char byte = 0;
	if (gate < 0)
		return;
	(void)!write(gate, &byte, 1);
	close(gate);
	gate = -1;
}

void workload_reaped(pid_t reaped, int status)
{
	if (reaped != pid)
		return;
	pid = -1;
	workload_go(); /* it may have been killed at the gate */
	tcsetpgrp(console_fd, getpid());
	drain_console();
	say("workload-exit code=%d", WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}
