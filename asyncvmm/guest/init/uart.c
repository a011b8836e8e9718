/*
 * COM2 as a polled 16550 (National Semiconductor PC16550D data sheet): 115200 8N1, FIFOs on.
 *
 * Each access may be an exit to the VMM, and a string of bytes is one access: so a FIFO is written whole for one look at
 * the LSR, and read nearly whole where the IIR says that it has reached its trigger level. The IIR says so only of an
 * enabled interrupt; without OUT2 it goes no further.
 */
#include "init.h"

#include <sys/io.h>

enum { COM2 = 0x2f8, PORTS = 8 };
enum { THR = COM2, RBR = COM2, DLL = COM2, IER = COM2 + 1, DLM = COM2 + 1, IIR = COM2 + 2, FCR = COM2 + 2 };
enum { LCR = COM2 + 3, MCR = COM2 + 4, LSR = COM2 + 5 };
enum { LCR_8N1 = 0x03, LCR_DLAB = 0x80, FCR_ENABLE_AND_CLEAR_14 = 0xc7, MCR_DTR_RTS = 0x03 };
enum { IER_RECEIVED = 0x01, IIR_ID = 0x0f, IIR_RECEIVED = 0x04 };
enum { LSR_DR = 0x01, LSR_THRE = 0x20, NO_DEVICE = 0xff };
enum { FIFO_SIZE = 16, TRIGGER = 14, SPINS = 64, PATIENCE_MS = 2000 };

static bool present;
static bool cut; /* the last line was given up half-way */

static unsigned char held[TRIGGER]; /* read from the FIFO, and not yet asked for */
static unsigned first_held, end_held;
static bool trickles; /* less than a trigger level is left: the bytes come one by one */

void uart_open(void)
{
	if (ioperm(COM2, PORTS, 1) != 0 || inb(LSR) == NO_DEVICE)
		return;
	outb(0, IER);
	outb(LCR_DLAB, LCR);
	outb(1, DLL);
	outb(0, DLM);
	outb(LCR_8N1, LCR);
	outb(FCR_ENABLE_AND_CLEAR_14, FCR);
	outb(MCR_DTR_RTS, MCR);
	outb(IER_RECEIVED, IER);
	present = true;
}

/* The permission bitmap survives fork and exec, so a child must give it back itself. */
void uart_revoke(void)
{
	ioperm(COM2, PORTS, 0);
	present = false;
}

static bool wait_for_thre(void)
{
	for (int i = 0; i < SPINS + PATIENCE_MS; i++) {
		if (inb(LSR) & LSR_THRE)
			return true;
		if (i >= SPINS)
			sleep_ms(1);
	}
	return false;
}

static void send(const char *bytes, size_t length)
{
	for (size_t i = 0; i < length; i += FIFO_SIZE) {
		if (!wait_for_thre()) {
			cut = true;
			return;
		}
		outsb(THR, bytes + i, length - i < FIFO_SIZE ? length - i : FIFO_SIZE);
	}
}

void uart_write(const char *text, size_t length)
{
	if (!present)
		return;
	if (cut) { /* end the half line, or it would swallow this one */
		cut = false;
		send("\n", 1);
	}
	if (!cut)
		send(text, length);
}

/* Returns whether there is a byte. */
static bool fetch(void)
{
	if (!(inb(LSR) & LSR_DR)) {
		trickles = false;
		return false;
	}
	trickles = trickles || (inb(IIR) & IIR_ID) != IIR_RECEIVED;
	first_held = 0;
	end_held = trickles ? 1 : TRIGGER;
	insb(RBR, held, end_held);
	return true;
}

int uart_read(void)
{
	if (!present || (first_held == end_held && !fetch()))
		return -1;
	return held[first_held++];
}
