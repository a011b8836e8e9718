/*
 * COM2 as a polled 16550 (National Semiconductor PC16550D data sheet): 115200 8N1, FIFOs on, interrupts off.
 *
 * Each register access may be an exit to the VMM, so a full FIFO is written for one look at the LSR.
 */
#include "init.h"

#include <sys/io.h>

enum { COM2 = 0x2f8, PORTS = 8 };
enum { THR = COM2, RBR = COM2, DLL = COM2, IER = COM2 + 1, DLM = COM2 + 1, FCR = COM2 + 2 };
enum { LCR = COM2 + 3, MCR = COM2 + 4, LSR = COM2 + 5 };
enum { LCR_8N1 = 0x03, LCR_DLAB = 0x80, FCR_ENABLE_AND_CLEAR = 0x07, MCR_DTR_RTS = 0x03 };
enum { LSR_DR = 0x01, LSR_THRE = 0x20, NO_DEVICE = 0xff };
enum { FIFO_SIZE = 16, SPINS = 64, PATIENCE_MS = 2000 };

static bool present;
static bool cut; /* the last line was given up half-way */

void uart_open(void)
{
	if (ioperm(COM2, PORTS, 1) != 0 || inb(LSR) == NO_DEVICE)
		return;
	outb(0, IER);
	outb(LCR_DLAB, LCR);
	outb(1, DLL);
	outb(0, DLM);
	outb(LCR_8N1, LCR);
	outb(FCR_ENABLE_AND_CLEAR, FCR);
	outb(MCR_DTR_RTS, MCR);
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
	for (size_t i = 0; i < length; i++) {
		if (i % FIFO_SIZE == 0 && !wait_for_thre()) {
			cut = true;
			return;
		}
		outb((unsigned char)bytes[i], THR);
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

int uart_read(void)
{
	if (!present || !(inb(LSR) & LSR_DR))
		return -1;
	return inb(RBR);
}
