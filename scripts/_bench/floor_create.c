/* The floor of creating a VM: from open("/dev/kvm") to the first exit. Freeing is not timed.
 *
 *     floor_create RECIPE MIB [irqchip-first]
 *
 * Built as a shared object it is a library with floor_prepare and floor_sample, for a floor in the same address space.
 */
#include "floor_vm.h"

static uint64_t sample(void)
{
    struct vm vm;
    uint64_t begin = now();
    make_vm(&vm);
    CALL(vm.vcpu, KVM_RUN, 0);
    uint64_t took = now() - begin;
    if (vm.run->exit_reason != KVM_EXIT_IO)
        die("not the guest's OUT");
    destroy(&vm);
    return took;
}

int main(int count, char **words)
{
    return serve(count, words, sample);
}

/* Take the recipe; 0 if that failed. */
int floor_prepare(const char *path, const char *mib)
{
    jmp_buf here;
    caller = &here;
    if (setjmp(here))
        return 0;
    prepare(path, mib);
    return 1;
}

/* Nanoseconds of one sample; 0 if it failed. */
uint64_t floor_sample(void)
{
    jmp_buf here;
    caller = &here;
    return setjmp(here) ? 0 : sample();
}
