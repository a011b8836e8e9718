/* The floor of a kick and of an interrupt: the guest kicks.S with an ioeventfd and an irqfd, KVM_RUN on one thread, and
 * another one that waits in read() for the kick and writes the interrupt. One sample is all of the guest's kicks.
 *
 *     floor_kick RECIPE MIB STAMPS KICKS
 *
 * For each line on stdin, two lines on stdout: nanoseconds from each kick to the reader, and from each write of the
 * interrupt to the guest's handler.
 */
#include "floor_vm.h"
#include <pthread.h>
#include <sys/eventfd.h>
#include <x86intrin.h>

#define NOTIFY 0xc0001050ull
#define ACKNOWLEDGE 0xc0001064ull
#define GSI 5
#define MOST 100000

static uint64_t kicks[MOST], interrupts[MOST];

static uint64_t guest_offset(int vcpu)
{
    uint64_t offset = 0;
    struct kvm_device_attr attribute = {0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, (uintptr_t)&offset};
    CALL(vcpu, KVM_GET_DEVICE_ATTR, &attribute);
    return offset;
}

static int on_write(int vm, uint64_t address, uint32_t value)
{
    int fd = eventfd(0, EFD_CLOEXEC);
    struct kvm_ioeventfd event = {
        .datamatch = value, .addr = address, .len = 4, .fd = fd, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH};
    CALL(vm, KVM_IOEVENTFD, &event);
    return fd;
}

static void *run(void *argument)
{
    struct vm *vm = argument;
    do
        CALL(vm->vcpu, KVM_RUN, 0);
    while (vm->run->exit_reason != KVM_EXIT_IO || vm->run->io.port != 0xf4);
    return 0;
}

static void print(const uint64_t *ticks, int count, double ns)
{
    for (int i = 0; i < count; i++)
        printf("%.0f ", ticks[i] * ns);
    printf("\n");
}

static void sample(uint64_t where, int count)
{
    struct vm vm;
    pthread_t thread;
    uint64_t value, written = 0, one = 1, begin_ns, begin_tsc;
    make_vm(&vm);
    uint64_t offset = guest_offset(vm.vcpu);
    int kick = on_write(vm.vm, NOTIFY, 0), acknowledged = on_write(vm.vm, ACKNOWLEDGE, 1);
    struct kvm_irqfd line = {.fd = eventfd(0, EFD_CLOEXEC), .gsi = GSI};
    CALL(vm.vm, KVM_IRQFD, &line);
    volatile uint64_t *stamps = (volatile uint64_t *)(vm.memory + where);
    begin_ns = now(), begin_tsc = __rdtsc();
    pthread_create(&thread, 0, run, &vm);
    for (int i = 0; i <= count; i++) {
        if (read(kick, &value, sizeof value) != sizeof value)
            die("read");
        if (i < count)
            kicks[i] = __rdtsc() - (stamps[0] - offset);
        if (i > 0)
            interrupts[i - 1] = stamps[1] - offset - written;
        written = __rdtsc();
        if (i < count && write(line.fd, &one, sizeof one) != sizeof one)
            die("write");
    }
    pthread_join(thread, 0);
    double ns = (double)(now() - begin_ns) / (__rdtsc() - begin_tsc);
    print(kicks, count, ns);
    print(interrupts, count, ns);
    fflush(stdout);
    close(kick), close(acknowledged), close(line.fd);
    destroy(&vm);
}

int main(int count, char **words)
{
    char line[64];
    if (count != 5)
        die("usage: floor_kick RECIPE MIB STAMPS KICKS");
    prepare(words[1], words[2]);
    while (fgets(line, sizeof line, stdin))
        sample(strtoull(words[3], 0, 0), atoi(words[4]));
    return 0;
}
