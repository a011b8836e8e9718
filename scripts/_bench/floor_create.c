/* The floor of creating a VM: from open("/dev/kvm") to the first exit. Freeing is not timed.
 *
 *     floor_create RECIPE MIB [irqchip-first]
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
